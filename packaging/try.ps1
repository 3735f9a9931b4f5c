# Try localllm from a checkout on Windows: sets it up (the first time) and lets the built-in demo model answer.
#
#   packaging\try.ps1                 one answer
#   packaging\try.ps1 run demo        a chat; any localllm command goes here
#
# $env:BACKEND = cpu | cuda | vulkan   overrides what is detected
# $env:CMAKE_ARGS                      is used as given instead
# $env:PYTHON                          the Python to build on (3.11 or newer)
Set-StrictMode -Version 3
$ErrorActionPreference = 'Stop'
Set-Location (Join-Path $PSScriptRoot '..')

$venv = Join-Path (Get-Location) '.venv'
$python = Join-Path $venv 'Scripts\python.exe'
$log = Join-Path $venv 'setup.log'

function Stop-Setup([string]$Message, [string[]]$Hints) {
    [Console]::Error.WriteLine("error: $Message")
    foreach ($hint in $Hints) { [Console]::Error.WriteLine("hint: $hint") }
    exit 1
}

function Test-Command([string]$Name) { [bool](Get-Command $Name -ErrorAction SilentlyContinue) }

function Find-Python {
    $candidates = @(@($env:PYTHON), @($python), @('py', '-3'), @('python3'), @('python'))
    foreach ($candidate in $candidates) {
        $command = @($candidate)[0]
        if (-not $command -or -not (Test-Command $command)) { continue }
        $arguments = @(@($candidate) | Select-Object -Skip 1) + @('-c', 'import sys; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)')
        try { $found = & $command @arguments 2>$null } catch { continue }
        if ($LASTEXITCODE -eq 0 -and $found) { return [string]$found }
    }
    Stop-Setup 'no Python 3.11 or newer found' @('winget install Python.Python.3.12', 'or name one: $env:PYTHON = "C:\path\python.exe"')
}

# The word for people; sets CMAKE_ARGS. A toolkit without its device is no use: the library would not even load.
function Get-Backend {
    if ($env:CMAKE_ARGS) { return 'as CMAKE_ARGS says' }
    $gpu = $false
    if (Test-Command 'nvidia-smi') {
        try { $gpu = [bool]((& nvidia-smi -L 2>$null) -match 'GPU') } catch { $gpu = $false }
    }
    $backend = $env:BACKEND
    if (-not $backend) {
        if ($gpu -and (Test-Command 'nvcc')) { $backend = 'cuda' }
        elseif ($env:VULKAN_SDK) { $backend = 'vulkan' }
        else {
            $backend = 'cpu'
            if ($gpu) { [Console]::Error.WriteLine('An NVIDIA GPU is here but no CUDA toolkit (nvcc): install it and run this again to use the GPU.') }
        }
    }
    switch ($backend) {
        'cpu' { }
        'cuda' { $env:CMAKE_ARGS = '-DGGML_CUDA=on' }
        'vulkan' { $env:CMAKE_ARGS = '-DGGML_VULKAN=on' }
        default { Stop-Setup "BACKEND=$backend is unknown" @('use cpu, cuda or vulkan') }
    }
    return $backend
}

function Assert-Compiler {
    $vswhere = Join-Path ${env:ProgramFiles(x86)} 'Microsoft Visual Studio\Installer\vswhere.exe'
    $found = (Test-Path $vswhere) -and (& $vswhere -latest -products * -requires Microsoft.VisualStudio.Component.VC.Tools.x86.x64 -property installationPath)
    if (-not $found -and -not (Test-Command 'cl') -and -not (Test-Command 'g++') -and -not (Test-Command 'clang++')) {
        Stop-Setup 'no C++ compiler: llama.cpp is compiled for this machine' @(
            'winget install Microsoft.VisualStudio.2022.BuildTools --override "--passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"')
    }
}

function Invoke-Pip([string]$What, [string[]]$Arguments) {
    [Console]::Error.WriteLine($What)
    # Native programs' stderr must not become a PowerShell error.
    $ErrorActionPreference = 'Continue'
    & $python -m pip --disable-pip-version-check install @Arguments *>> $log
    $code = $LASTEXITCODE
    $ErrorActionPreference = 'Stop'
    if ($code -ne 0) {
        Get-Content $log -Tail 25 | ForEach-Object { [Console]::Error.WriteLine($_) }
        Stop-Setup "${What}: failed" @("the whole log is $log", 'if a GPU backend does not compile: $env:BACKEND = "cpu"')
    }
}

function Read-Stamp([string]$Path) { if (Test-Path $Path) { (Get-Content $Path -Raw).Trim() } else { '' } }

$lock = $null
while (-not $lock) {
    try { $lock = [IO.File]::Open("$venv.lock", 'OpenOrCreate', 'ReadWrite', 'None') }
    catch [IO.IOException] {
        [Console]::Error.WriteLine('Another setup is running; waiting for it.')
        Start-Sleep -Seconds 2
    }
}
try {
    $backend = Get-Backend
    $llama = [regex]::Match((Get-Content pyproject.toml -Raw), '"(llama-cpp-python==[^"]+)"').Groups[1].Value
    $build = "$llama $backend $env:CMAKE_ARGS".Trim()
    $wanted = "$((Get-FileHash pyproject.toml).Hash) $build"
    $stamp = Join-Path $venv '.localllm-setup'
    $built = Join-Path $venv '.localllm-build'

    if (-not (Test-Path $python)) {
        & (Find-Python) -m venv $venv
        if ($LASTEXITCODE -ne 0) { Stop-Setup 'cannot make a virtual environment' @("look at $venv") }
    }
    if ((Read-Stamp $stamp) -ne $wanted) {
        Set-Content $log ''
        if ((Read-Stamp $built) -ne $build) {
            Assert-Compiler
            $options = @('--force-reinstall', '--no-deps', $llama)
            # pip's cache does not know CMAKE_ARGS: read and write it for the plain build only.
            if ($env:CMAKE_ARGS) { $options = @('--no-cache-dir', '--no-binary', 'llama-cpp-python') + $options }
            Remove-Item $built -ErrorAction SilentlyContinue
            Invoke-Pip "Compiling llama.cpp, backend: $backend (minutes, once)" $options
            Set-Content $built $build
        }
        Invoke-Pip 'Installing localllm' @('--editable', '.')
        Set-Content $stamp $wanted
    }
}
finally { $lock.Dispose() }

$localllm = Join-Path $venv 'Scripts\localllm.exe'
if ($args.Count -gt 0) {
    & $localllm @args
    exit $LASTEXITCODE
}
$question = 'Tell me a story about a fox.'
[Console]::Error.WriteLine("> $question")
& $localllm run demo $question
$code = $LASTEXITCODE
[Console]::Error.WriteLine("`nMore:  packaging\try.ps1 run demo    a chat`n       packaging\try.ps1 bench demo  measure this machine")
exit $code
