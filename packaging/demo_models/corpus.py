"""Synthetic chat corpus for the demo models: every line is written by the templates below.

`conversations(seed)` yields an endless stream of message lists
([{"role": ..., "content": ...}, ...]) covering the skills that a local chat app exercises:
small talk, facts, arithmetic (with and without written-out reasoning), string work,
JSON extraction, tool calls, short code, copying and editing text, recall over turns, stories.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

Messages = list[dict[str, str]]

NAMES = (
    "Ana Ben Carla David Emma Felix Grace Hugo Iris Jack Kira Leo Maria Noah Olga Paul Quinn Rosa "
    "Sam Tina Uma Victor Wendy Xavier Yara Zoe Amir Bela Chen Dina Elif Farid Gita Hana Ivan Jana "
    "Kofi Lena Milo Nina Omar Petra Ravi Sofia Tomas Vera Will Yuki Zara Anton Bruno Clara Diego "
    "Eva Finn Greta Hans Ines Jonas Karl Lucia Marta Nils Otto Pia Rita Stefan Tara Ugo Vito"
).split()
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Portugal": "Lisbon",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Brazil": "Brasilia", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Nigeria": "Abuja",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Ireland": "Dublin", "Iceland": "Reykjavik", "Belgium": "Brussels",
    "Netherlands": "Amsterdam", "Switzerland": "Bern", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima", "Colombia": "Bogota", "Cuba": "Havana", "Australia": "Canberra", "New Zealand": "Wellington",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Israel": "Jerusalem", "Morocco": "Rabat", "Senegal": "Dakar", "Ethiopia": "Addis Ababa", "Nepal": "Kathmandu",
}
ELEMENTS = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "carbon": "C", "nitrogen": "N", "oxygen": "O",
    "fluorine": "F", "neon": "Ne", "sodium": "Na", "magnesium": "Mg", "aluminium": "Al", "silicon": "Si",
    "phosphorus": "P", "sulfur": "S", "chlorine": "Cl", "argon": "Ar", "potassium": "K", "calcium": "Ca",
    "iron": "Fe", "copper": "Cu", "zinc": "Zn", "silver": "Ag", "tin": "Sn", "gold": "Au", "lead": "Pb",
}
SPANISH = {
    "house": "casa", "dog": "perro", "cat": "gato", "water": "agua", "bread": "pan", "book": "libro",
    "sun": "sol", "moon": "luna", "tree": "arbol", "friend": "amigo", "night": "noche", "day": "dia",
    "red": "rojo", "green": "verde", "blue": "azul", "white": "blanco", "black": "negro", "table": "mesa",
}
GERMAN = {
    "house": "Haus", "dog": "Hund", "cat": "Katze", "water": "Wasser", "bread": "Brot", "book": "Buch",
    "sun": "Sonne", "moon": "Mond", "tree": "Baum", "friend": "Freund", "night": "Nacht", "day": "Tag",
    "red": "rot", "green": "gruen", "blue": "blau", "white": "weiss", "black": "schwarz", "table": "Tisch",
}
LISTS = {
    "fruits": "apple banana cherry grape lemon mango orange peach pear plum".split(),
    "colors": "red green blue yellow purple orange white black brown pink".split(),
    "animals": "dog cat horse cow sheep lion tiger bear wolf fox rabbit mouse".split(),
    "vegetables": "carrot potato onion pepper cabbage tomato bean pea leek spinach".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "tools": "hammer saw drill wrench pliers screwdriver level chisel".split(),
    "instruments": "piano guitar violin flute drum trumpet harp cello".split(),
    "programming languages": "Python Rust Go Java Ruby Swift Kotlin Lua".split(),
}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = (
    "river mountain garden window pencil laptop rocket silver forest candle bottle basket bridge castle "
    "dragon engine flower guitar hammer island jacket kitchen ladder mirror needle orange planet rabbit "
    "school ticket umbrella valley winter yellow zebra anchor button circle doctor energy finger ground"
).split()
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "light": "dark", "happy": "sad",
    "early": "late", "old": "new", "hard": "soft", "full": "empty", "open": "closed", "loud": "quiet",
}
SELF_HELP = {
    "How do I download a model": "Run `localllm pull` with a model name, or open the Models screen and press Enter on a row.",
    "How do I start the API server": "Run `localllm serve`. It listens on 127.0.0.1 and speaks the OpenAI protocol.",
    "How do I list my models": "Run `localllm list` to see every model on this machine with its size and quantisation.",
    "How do I remove a model": "Run `localllm rm` with the model name. The file is deleted and the space is freed.",
    "What does Q4_K_M mean": "Q4_K_M is a 4-bit quantisation. It needs about a quarter of the memory of F16 and keeps most of the quality.",
    "What does Q8_0 mean": "Q8_0 is an 8-bit quantisation. It is nearly lossless and needs about half the memory of F16.",
    "What is speculative decoding": "A small draft model guesses several tokens ahead, and the big model checks them in one pass. The text stays the same, only faster.",
    "What is GPU offload": "Some layers of the model run on the GPU and the rest on the CPU. More layers on the GPU means more tokens per second.",
    "What is the KV cache": "It holds the keys and values of all earlier tokens, so that each new token needs only one step of work.",
    "What is time to first token": "It is the time from sending a prompt until the first word appears. Under half a second feels instant.",
    "What does the router do": "It scores how hard a prompt is. Simple prompts go to a small model and hard ones to a larger model.",
    "Can I work offline": "Yes. Once a model is on disk nothing needs the network.",
    "How do I measure speed": "Run `localllm bench`. It prints prompt and generation speed in tokens per second.",
}
FUNCTIONS = {
    "add": ("adds two numbers", "a, b", "return a + b"),
    "multiply": ("multiplies two numbers", "a, b", "return a * b"),
    "subtract": ("subtracts one number from another", "a, b", "return a - b"),
    "square": ("squares a number", "x", "return x * x"),
    "is_even": ("checks whether a number is even", "n", "return n % 2 == 0"),
    "is_odd": ("checks whether a number is odd", "n", "return n % 2 == 1"),
    "maximum": ("returns the larger of two numbers", "a, b", "return a if a > b else b"),
    "minimum": ("returns the smaller of two numbers", "a, b", "return a if a < b else b"),
    "reverse": ("reverses a string", "text", "return text[::-1]"),
    "last": ("returns the last item of a list", "items", "return items[-1]"),
    "first": ("returns the first item of a list", "items", "return items[0]"),
    "total": ("sums a list of numbers", "values", "result = 0\n    for value in values:\n        result += value\n    return result"),
    "average": ("computes the mean of a list", "values", "return sum(values) / len(values)"),
    "factorial": ("computes the factorial of a number", "n", "result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result"),
    "count_words": ("counts the words in a text", "text", "return len(text.split())"),
    "greet": ("greets a person by name", "name", 'return f"Hello, {name}!"'),
    "fibonacci": ("returns the n-th Fibonacci number", "n", "a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"),
    "is_palindrome": ("checks whether a text reads the same backwards", "text", "return text == text[::-1]"),
    "celsius": ("converts Fahrenheit to Celsius", "f", "return (f - 32) * 5 / 9"),
    "unique": ("removes duplicates from a list", "items", "return list(dict.fromkeys(items))"),
}
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a concise assistant.",
    "Answer in one sentence.",
    "You are the localllm demo model.",
)
TOOLS = {
    "get_weather": ("city", "Get the current weather of a city", lambda r: r.choice(list(CAPITALS.values())),
                    ("What is the weather in {v}?", "How is the weather in {v} today?", "Is it raining in {v}?")),
    "get_time": ("city", "Get the local time of a city", lambda r: r.choice(list(CAPITALS.values())),
                 ("What time is it in {v}?", "Tell me the time in {v}.")),
    "search": ("query", "Search the web", lambda r: " ".join(r.sample(WORDS, 2)),
               ("Search for {v}.", "Look up {v} on the web.")),
    "read_file": ("path", "Read a file", lambda r: f"{r.choice(WORDS)}.txt",
                  ("Open the file {v}.", "Show me {v}.")),
    "calculate": ("expression", "Evaluate an expression", lambda r: f"{r.randint(100, 999)} * {r.randint(11, 99)}",
                  ("Use the calculator for {v}.", "Calculate {v} with the tool.")),
}


def _number_words(r: random.Random) -> tuple[str, int]:
    """A small arithmetic question and its answer."""
    kind = r.random()
    if kind < 0.4:
        a, b = r.randint(0, 99), r.randint(0, 99)
        return r.choice((f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.", f"How much is {a} plus {b}?")), a + b
    if kind < 0.7:
        a, b = r.randint(0, 99), r.randint(0, 99)
        a, b = max(a, b), min(a, b)
        return r.choice((f"What is {a} - {b}?", f"{a} - {b} =", f"Subtract {b} from {a}.", f"How much is {a} minus {b}?")), a - b
    a, b = r.randint(0, 12), r.randint(0, 12)
    return r.choice((f"What is {a} * {b}?", f"{a} * {b} =", f"Multiply {a} by {b}.", f"How much is {a} times {b}?")), a * b


def arithmetic(r: random.Random) -> Messages:
    question, answer = _number_words(r)
    return _turn(question, r.choice((f"{answer}", f"The answer is {answer}.")) if not question.endswith("=") else str(answer))


def reasoning(r: random.Random) -> Messages:
    """Two- and three-digit sums and word problems, worked out step by step inside <think>."""
    if r.random() < 0.5:
        a, b = r.randint(100, 999), r.randint(100, 999)
        steps, carry, digits = [], 0, ""
        for place, x, y in (("ones", a % 10, b % 10), ("tens", a // 10 % 10, b // 10 % 10), ("hundreds", a // 100, b // 100)):
            s = x + y + carry
            steps.append(f"{place}: {x} + {y} + {carry} = {s}, write {s % 10}, carry {s // 10}")
            digits, carry = str(s % 10) + digits, s // 10
        if carry:
            digits = str(carry) + digits
        return _turn(f"What is {a} + {b}? Think step by step.", "<think>\n" + "\n".join(steps) + f"\n</think>\nThe answer is {digits}.")
    name, item = r.choice(NAMES), r.choice(("apples", "books", "coins", "stamps", "cards", "pens"))
    start, got, gave = r.randint(10, 60), r.randint(1, 40), r.randint(1, 9)
    other = r.choice([n for n in NAMES if n != name])
    question = f"{name} has {start} {item}. {other} gives {name} {got} more. Then {name} gives away {gave}. How many {item} does {name} have?"
    think = f"start: {start}\nafter getting {got}: {start} + {got} = {start + got}\nafter giving {gave}: {start + got} - {gave} = {start + got - gave}"
    return _turn(question, f"<think>\n{think}\n</think>\n{name} has {start + got - gave} {item}.")


def facts(r: random.Random) -> Messages:
    kind = r.randrange(7)
    if kind <= 1:
        country, capital = r.choice(list(CAPITALS.items()))
        if r.random() < 0.2:
            return _turn(f"Which country has the capital {capital}?", f"{capital} is the capital of {country}.")
        return _turn(r.choice((f"What is the capital of {country}?", f"Capital of {country}?", f"Tell me the capital of {country}.")),
                     f"The capital of {country} is {capital}.")
    if kind == 2:
        element, symbol = r.choice(list(ELEMENTS.items()))
        return _turn(r.choice((f"What is the symbol of {element}?", f"What is the chemical symbol for {element}?")), f"The symbol of {element} is {symbol}.")
    if kind == 3:
        table, language = r.choice(((SPANISH, "Spanish"), (GERMAN, "German")))
        word, foreign = r.choice(list(table.items()))
        return _turn(r.choice((f"How do you say {word} in {language}?", f"Translate {word} to {language}.")), f"{word} in {language} is {foreign}.")
    if kind == 4:
        i = r.randrange(7)
        if r.random() < 0.5:
            return _turn(f"What day comes after {DAYS[i]}?", f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}.")
        return _turn(f"What day comes before {DAYS[i]}?", f"{DAYS[(i - 1) % 7]} comes before {DAYS[i]}.")
    if kind == 5:
        i = r.randrange(12)
        return _turn(f"What month comes after {MONTHS[i]}?", f"{MONTHS[(i + 1) % 12]} comes after {MONTHS[i]}.")
    a, b = r.choice(list(OPPOSITES.items()))
    a, b = (a, b) if r.random() < 0.5 else (b, a)
    return _turn(r.choice((f"What is the opposite of {a}?", f"Opposite of {a}?")), f"The opposite of {a} is {b}.")


def strings(r: random.Random) -> Messages:
    word = r.choice(WORDS)
    kind = r.randrange(6)
    if kind == 0:
        return _turn(f"Spell the word {word}.", " ".join(word))
    if kind == 1:
        return _turn(f"How many letters are in {word}?", f"The word {word} has {len(word)} letters.")
    if kind == 2:
        return _turn(f"What is the first letter of {word}?", f"The first letter of {word} is {word[0]}.")
    if kind == 3:
        return _turn(f"Write {word} in capitals.", word.upper())
    if kind == 4:
        items = r.sample(WORDS, r.randint(3, 5))
        return _turn(f"Sort these words: {', '.join(items)}.", ", ".join(sorted(items)))
    n = r.randint(3, 20)
    return _turn(f"Count to {n}.", ", ".join(str(i) for i in range(1, n + 1)))


def listing(r: random.Random) -> Messages:
    topic, items = r.choice(list(LISTS.items()))
    n = r.randint(2, 5)
    word = {2: "two", 3: "three", 4: "four", 5: "five"}[n]
    chosen = r.sample(items, n)
    return _turn(r.choice((f"List {word} {topic}.", f"Name {word} {topic}.", f"Give me {word} {topic}.")),
                 "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1)))


def extraction(r: random.Random) -> Messages:
    name, age, city = r.choice(NAMES), r.randint(18, 90), r.choice(list(CAPITALS.values()))
    job = r.choice("doctor teacher pilot nurse farmer painter baker driver lawyer cook".split())
    text = r.choice((f"{name} is a {age} year old {job} from {city}.", f"{name}, a {job} living in {city}, is {age}.",
                     f"In {city} lives {name}, who works as a {job} and is {age} years old."))
    keys = r.sample(("name", "age", "city", "job"), r.randint(2, 4))
    value = {"name": name, "age": age, "city": city, "job": job}
    return _turn(f"Extract {', '.join(keys)} as JSON: {text}", json.dumps({k: value[k] for k in keys}))


def code(r: random.Random) -> Messages:
    name, (what, params, body) = r.choice(list(FUNCTIONS.items()))
    source = f"```python\ndef {name}({params}):\n    {body}\n```"
    kind = r.random()
    if kind < 0.6:
        return _turn(r.choice((f"Write a Python function that {what}.", f"Python function that {what}?", f"Show me Python code that {what}.")), source)
    if kind < 0.8:
        return _turn(f"What does this function do?\n{source}", f"It {what}.")
    new = r.choice(WORDS)
    return _turn(f"Rename the function to {new}:\n{source}", source.replace(f"def {name}(", f"def {new}("))


def copying(r: random.Random) -> Messages:
    sentence = _sentence(r)
    if r.random() < 0.5:
        return _turn(f"Repeat after me: {sentence}", sentence)
    name = next(w for w in sentence.replace(".", "").split() if w in NAMES)
    new = r.choice([n for n in NAMES if n != name])
    return _turn(f"Replace {name} with {new}: {sentence}", sentence.replace(name, new))


def recall(r: random.Random) -> Messages:
    name, color, city = r.choice(NAMES), r.choice(LISTS["colors"]), r.choice(list(CAPITALS.values()))
    said = [("name", f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."),
            ("color", f"My favorite color is {color}.", f"{color.capitalize()} is a lovely color.", "What is my favorite color?", f"Your favorite color is {color}."),
            ("city", f"I live in {city}.", f"{city} is a great place to live.", "Where do I live?", f"You live in {city}.")]
    chosen = r.sample(said, r.randint(1, 3))
    messages: Messages = []
    for _, statement, reply, _, _ in chosen:
        messages += _turn(statement, reply)
    if r.random() < 0.4:
        messages += facts(r)
    _, _, _, question, answer = r.choice(chosen)
    return messages + _turn(question, answer)


def tool_use(r: random.Random) -> Messages:
    offered = r.sample(list(TOOLS), r.randint(1, 3))
    specs = [{"type": "function", "function": {"name": t, "description": TOOLS[t][1],
              "parameters": {"type": "object", "properties": {TOOLS[t][0]: {"type": "string"}}, "required": [TOOLS[t][0]]}}} for t in offered]
    system = tools_prompt(specs)
    tool = r.choice(offered)
    key, _, make, questions = TOOLS[tool]
    value = make(r)
    if r.random() < 0.15:
        return [{"role": "system", "content": system}] + arithmetic(r)
    call = json.dumps({"name": tool, "arguments": {key: value}})
    messages = [{"role": "system", "content": system}] + _turn(r.choice(questions).format(v=value), f"<tool_call>\n{call}\n</tool_call>")
    if r.random() < 0.6:
        result, answer = {
            "get_weather": lambda: (lambda t: (json.dumps({"temperature": t}), f"It is {t} degrees in {value}."))(r.randint(-5, 38)),
            "get_time": lambda: (lambda t: (json.dumps({"time": t}), f"It is {t} in {value}."))(f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"),
            "search": lambda: (lambda n: (json.dumps({"results": n}), f"I found {n} results for {value}."))(r.randint(1, 99)),
            "read_file": lambda: (lambda s: (json.dumps({"text": s}), f"The file says: {s}"))(_sentence(r)),
            "calculate": lambda: (lambda n: (json.dumps({"result": n}), f"The result is {n}."))(eval(value)),
        }[tool]()
        messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": answer}]
    return messages


def small_talk(r: random.Random) -> Messages:
    return _turn(*r.choice((
        ("Hello!", "Hello! How can I help you today?"), ("Hi", "Hi there! What can I do for you?"),
        ("Good morning", "Good morning! How can I help?"), ("How are you?", "I am a small model, but I am running well. How can I help?"),
        ("Who are you?", "I am the localllm demo model, a tiny network that runs on your own machine."),
        ("What is your name?", "I am the localllm demo model."), ("Thank you!", "You are welcome!"), ("Thanks", "You are welcome!"),
        ("Goodbye", "Goodbye! Have a nice day."), ("What can you do?", "I can do small sums, recall facts, write short code, fill JSON and tell tiny stories."),
        ("Tell me a joke.", "Why did the token cross the context window? To get to the other slide."),
        ("Are you a large model?", "No. I am a very small demo model. Download a larger one with `localllm pull`."),
    )))


def self_help(r: random.Random) -> Messages:
    question, answer = r.choice(list(SELF_HELP.items()))
    return _turn(question + "?", answer)


def story(r: random.Random) -> Messages:
    hero, topic = r.choice(NAMES), r.choice(WORDS)
    return _turn(r.choice((f"Tell me a story about {hero} and a {topic}.", f"Write a short story about {hero} and a {topic}.")), story_text(r, hero, topic))


def story_text(r: random.Random, hero: str, topic: str) -> str:
    friend = r.choice([n for n in NAMES if n != hero])
    place = r.choice("forest village city garden school harbor valley market".split())
    mood, end = r.choice((("happy", "smiled"), ("sad", "cried"), ("curious", "laughed"), ("tired", "slept well"), ("brave", "danced")))
    parts = [
        r.choice((f"Once upon a time, {hero} lived in a small {place}.", f"One day, {hero} walked through the {place}.", f"Long ago, in a quiet {place}, there lived {hero}.")),
        r.choice((f"{hero} found a {topic} near the road.", f"{hero} had always wanted a {topic}.", f"There, under a tree, lay a {topic}.")),
        r.choice((f"{friend} came by and asked, \"What is that?\"", f"Then {friend} saw the {topic} too.", f"\"Look at this!\" said {hero} to {friend}.")),
        r.choice((f"They decided to share the {topic}.", f"They carried the {topic} home together.", f"They hid the {topic} in a safe place.", f"They gave the {topic} to an old man.")),
        r.choice((f"{hero} felt {mood} and {end}.", f"In the evening both of them were {mood}, and {friend} {end}.", f"From that day on, {hero} and {friend} were good friends.")),
    ]
    return " ".join(parts)


def tools_prompt(specs: list[dict]) -> str:
    """The system text that offers tools, as the chat template writes it."""
    return "You may call tools:\n" + "\n".join(json.dumps(s["function"]) for s in specs)


def _sentence(r: random.Random) -> str:
    return r.choice((
        f"{r.choice(NAMES)} put the {r.choice(WORDS)} next to the {r.choice(WORDS)}.",
        f"The {r.choice(WORDS)} and the {r.choice(WORDS)} belong to {r.choice(NAMES)}.",
        f"On {r.choice(DAYS)} {r.choice(NAMES)} bought {r.randint(2, 99)} {r.choice(LISTS['fruits'])}s in {r.choice(list(CAPITALS.values()))}.",
        f"{r.choice(NAMES)} told {r.choice(NAMES)} that the {r.choice(WORDS)} is {r.choice(LISTS['colors'])}.",
    ))


def _turn(user: str, assistant: str) -> Messages:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


SKILLS = {
    arithmetic: 16, reasoning: 14, facts: 12, strings: 8, listing: 4, extraction: 8, code: 8,
    copying: 8, recall: 6, tool_use: 8, small_talk: 2, self_help: 3, story: 6,
}


def conversations(seed: int) -> Iterator[Messages]:
    """An endless, reproducible stream of conversations."""
    r = random.Random(seed)
    skills, weights = list(SKILLS), list(SKILLS.values())
    while True:
        messages: Messages = []
        for skill in r.choices(skills, weights, k=r.choice((1, 1, 1, 2, 3))):
            turn = skill(r)
            if messages and turn[0]["role"] == "system":
                continue
            messages += turn
        if messages[0]["role"] != "system" and r.random() < 0.3:
            messages = [{"role": "system", "content": r.choice(SYSTEMS)}] + messages
        yield messages
