#!/usr/bin/env bash
# Run every measurement that needs a GPU, with one command. See --help.
set -euo pipefail

usage() {
    cat <<'END'
usage: bench/run_on_gpu.sh --data DIR [--essential | --only NAME...] [--list]

Measure the claims of fastres on one NVIDIA GPU of compute capability 8.0 or more (A100, H100, H200), in stages: the
essential stages first, and the cheapest first once the kernels are chosen. Results go to bench/results/ as the suite's
JSON. At the end, the targets are printed next to the measurements, and the files to commit. If a stage fails, the other
stages still run.

  --data DIR      folder with cifar-10-batches-py, or CIFAR-10 as JPEGs in train/CLASS/ and test/CLASS/
  --essential     run only the essential stages: 25 minutes on an H100, by estimate
  --only NAME     run only this stage, even if it is not essential; may be repeated
  --again         run stages that are done again
  --list          list the stages, their needs, and the stages that are done; run nothing
  --stages FILE   read the stages from a file, with lines as in this script's list
  --record DIR    folder for the marks of stages that are done (default: bench/results/on_gpu)
  --logs DIR      folder for the stages' output (default: runs/on_gpu)
  --help

A stage is done if it has succeeded with this code, torch and device. After an interruption, run the same command again
to continue with the next stage. To set up, in the checkout:

  python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[dev,peers]'

For a machine without a network, run pip download -d wheels '.[dev,peers]' with the same Python on a machine with one,
copy the wheels, and run pip install --no-index --find-links wheels -e '.[dev,peers]'.

Exit status: 0 all done, 1 a stage failed, 2 a requirement is missing, 130 interrupted.
END
}

# name | minutes on an H100, an estimate | minutes after which it is stopped | essential | needs | what | command
# A stage may need a gpu, the data, and the table of the fastest kernels. If the table changes, a stage that needs it is
# no longer done, so the stages that write the table come before the stages that need it.
# Commands see PYTHON, DATA, DATA_OPTION (--data-root or --jpeg-copy), and the functions below.
builtin_stages() {
    cat <<'END'
doctor       |  2 |  7 | yes | gpu            | what this machine has, and a check of its kernels   | "$PYTHON" -m fastres.doctor && "$PYTHON" -m tests.kernels_on_device cuda 200
table        |  2 | 15 | yes | gpu            | the kernels for ResNet-20: kernels/batchnorm/fastest.json | fused "relu-128x"
table_256    |  4 | 15 | yes | gpu            | the kernels for ResNet-50 and the speed-run         | fused "relu-256x"
graphed      |  2 | 10 | yes | gpu,table      | graphed and ungraphed steps are bitwise identical   | bench schedule -k graphed
schedule     |  3 | 15 | yes | gpu,table      | the schedule's steps beside plain, compiled loops'  | bench schedule -k "not graphed"
parity_0     |  4 | 20 | yes | gpu,data,table | 64,000 steps beside the plain loop's, seed 0        | parity 0
kernel_times |  4 | 15 | yes | gpu,table      | a step's kernels, their times and gaps              | bench kernel_times
resnet50     |  4 | 15 | yes | gpu,table      | ResNet-50 beside timm's and torchvision's tuned     | bench peers -k "resnet50 and (timm or tuned) and not dali"
parity_1     |  4 | 20 | no  | gpu,data,table | 64,000 steps beside the plain loop's, seed 1        | parity 1
parity_2     |  4 | 20 | no  | gpu,data,table | 64,000 steps beside the plain loop's, seed 2        | parity 2
parity_3     |  4 | 20 | no  | gpu,data,table | 64,000 steps beside the plain loop's, seed 3        | parity 3
parity_4     |  4 | 20 | no  | gpu,data,table | 64,000 steps beside the plain loop's, seed 4        | parity 4
loaders      |  4 | 15 | no  | gpu            | the loaders, DALI on the GPU among them             | bench loaders
peers        |  4 | 20 | no  | gpu,table      | ResNet-50 fed by DALI, and beside a plain loop      | bench peers -k "resnet50 and (dali or plain)"
scaling      |  4 | 20 | no  | gpu,table      | the cost of a step by batch size and depth          | bench scaling
airbench     |  6 | 20 | no  | gpu,data,table | time to 90 % beside airbench's, n=25 each           | bench peers -k airbench --seeds 25
throughput   |  6 | 30 | no  | gpu,table      | every family in training and inference              | bench throughput
tests        | 10 | 40 | no  | gpu            | the test suite                                      | "$PYTHON" -m pytest -n auto --dist loadfile
time_to_90   | 12 | 40 | no  | gpu,data,table | time to 90 %, warm and cold, n=25                   | bench time_to_90 --seeds 25
kernels      | 15 | 45 | no  | gpu            | the fused kernels beside eager, compiled, apex      | bench kernels
compile      | 20 | 60 | no  | gpu,table      | inductor's settings one by one                      | bench compile
models       | 25 | 90 | no  | gpu,data,table | the other networks of He et al., 64,000 steps each  | bench accuracy -k model
END
}

# Run a file of the suite. It fails if every benchmark is skipped.
bench() {
    local file=$1 json=$LOG.json
    shift
    rm -f "$json"
    set -- "$PYTHON" -m pytest "bench/bench_$file.py" --benchmark-only --benchmark-json="$json" "$@"
    set -- "$@" -W default::pytest.PytestUnraisableExceptionWarning # a library's own warning does not spoil a figure
    [[ -z $DATA ]] || set -- "$@" "$DATA_OPTION" "$DATA"
    echo "$*"
    "$@" && if [[ ! -s $json ]]; then echo "nothing was measured; the reasons are above" && false; fi
}
# Measure the fused kernels, forward and backward in a graph, against inductor's, and write the table of the fastest.
fused() { bench kernels -k "$1 and full-graph and (two_pass or cooperative)" --write-table; }
parity() { bench accuracy -k "parity and not digits and seed$1" --seeds $(($1 + 1)); }
export -f bench fused parity

fail() {
    echo "run_on_gpu: error: $*" >&2
    exit 2
}

# ---- the command line -------------------------------------------------------------------------------------------

DATA="" stages_file="" essential="" list="" again=""
only=()
called_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
record=bench/results/on_gpu logs=runs/on_gpu
absolute() { case $1 in /*) echo "$1" ;; '~/'*) echo "$HOME/${1#*/}" ;; *) echo "$called_in/$1" ;; esac }

while (($#)); do
    case $1 in
        --data | --only | --stages | --record | --logs)
            (($# > 1)) || fail "$1 needs a value; --help lists all"
            case $1 in
                --data) DATA=$(absolute "$2") ;;
                --only) only+=("$2") ;;
                --stages) stages_file=$(absolute "$2") ;;
                --record) record=$(absolute "$2") ;;
                --logs) logs=$(absolute "$2") ;;
            esac
            shift 2
            ;;
        --essential) essential=1 && shift ;;
        --again) again=1 && shift ;;
        --list) list=1 && shift ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown argument $1; --help lists all" ;;
    esac
done
[[ -z $essential || ${#only[@]} -eq 0 ]] || fail "--essential: cannot be combined with --only; leave one of them out"
[[ -z $stages_file || -r $stages_file ]] || fail "cannot read $stages_file"

# ---- the stages -------------------------------------------------------------------------------------------------

trimmed() {
    local text=$1
    text=${text#"${text%%[![:space:]]*}"}
    echo "${text%"${text##*[![:space:]]}"}"
}

names=() minutes=() limits=() essentials=() needs=() whats=() commands=()
while IFS='|' read -r name estimate limit is_essential need what command; do
    name=$(trimmed "$name")
    [[ -n $name && $name != \#* ]] || continue
    command=$(trimmed "$command") estimate=$(trimmed "$estimate") limit=$(trimmed "$limit")
    [[ -n $command && $estimate =~ ^[0-9]+$ && $limit =~ ^[0-9.]+[smh]?$ ]] ||
        fail "stage $name: must be name | minutes | limit | essential | needs | what | command"
    [[ $limit =~ [smh]$ ]] || limit+=m
    names+=("$name") minutes+=("$estimate") limits+=("$limit") essentials+=("$(trimmed "$is_essential")")
    needs+=("$(trimmed "$need")") whats+=("$(trimmed "$what")") commands+=("$command")
done < <(if [[ -n $stages_file ]]; then cat "$stages_file"; else builtin_stages; fi)

chosen=()
for i in "${!names[@]}"; do
    if ((${#only[@]})); then
        for name in "${only[@]}"; do
            if [[ $name == "${names[i]}" ]]; then chosen+=("$i"); fi
        done
    elif [[ -z $essential || ${essentials[i]} == yes ]]; then
        chosen+=("$i")
    fi
done
for name in ${only[@]+"${only[@]}"}; do
    [[ " ${names[*]} " == *" $name "* ]] || fail "--only $name: unknown stage; --list names them"
done
((${#chosen[@]})) || fail "no stages to run; --list names them"

needed() {
    for i in "${chosen[@]}"; do
        [[ ",${needs[i]}," != *",$1,"* ]] || return 0
    done
    return 1
}

# ---- the requirements -------------------------------------------------------------------------------------------

PYTHON=${PYTHON:-$(command -v python || echo python3)}
DATA_OPTION=--data-root
[[ -z $DATA || -d $DATA/cifar-10-batches-py || ! -d $DATA/train ]] || DATA_OPTION=--jpeg-copy
export PYTHON DATA DATA_OPTION

# The device and torch, or "no GPU", or an error.
see_gpu='
import torch
if torch.cuda.is_available():
    print("%s|%d.%d|torch %s" % (torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), torch.__version__))
else:
    print("no GPU|0.0|torch %s" % torch.__version__)
'
device="no GPU" capability=0.0 torch=""
if needed gpu; then
    found=$("$PYTHON" -c "$see_gpu" 2>/dev/null) ||
        found="nothing|0.0|"
    IFS='|' read -r device capability torch <<<"$found"
fi

if [[ -z $list ]]; then
    if needed gpu; then
        [[ $device != nothing ]] ||
            fail "$PYTHON has no torch; pip install -e '.[dev,peers]' in this checkout, and activate its environment"
        [[ $device != "no GPU" ]] ||
            fail "torch sees no GPU here; run this on a machine with an A100, H100 or H200 (fastres doctor)"
        ((${capability%.*} >= 8)) ||
            fail "$device has compute capability $capability, below 8.0; use an A100, H100 or H200"
        output=$("$PYTHON" -c "import bench.conftest, bench.report, bench.bench_kernels, bench.bench_peers" 2>&1) ||
            fail "$(tail -n 1 <<<"$output"); pip install -e '.[dev,peers]' in this checkout"
        for peer in timm airbench nvidia.dali; do
            "$PYTHON" -c "import $peer" 2>/dev/null ||
                echo "run_on_gpu: $peer is not installed, so its measurements will fail" >&2
        done
        free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
        ((free_kib >= 5 * 1024 * 1024)) ||
            fail "$((free_kib / 1024)) MiB are free in $PWD; make room for 5 GiB"
    fi
    if needed data; then
        [[ -n $DATA ]] || fail "--data: is missing; give the folder of CIFAR-10 (--help describes its forms)"
        [[ -d $DATA/cifar-10-batches-py || (-d $DATA/train && -d $DATA/test) ]] ||
            fail "--data $DATA: holds neither cifar-10-batches-py nor train/ and test/; give the folder of CIFAR-10"
    fi
    command -v timeout >/dev/null || fail "no timeout on the PATH; install GNU coreutils"
fi

# ---- the marks of stages that are done --------------------------------------------------------------------------

slug=$(tr '[:upper:]' '[:lower:]' <<<"$device" | tr -cs 'a-z0-9\n' '-')
record=$record/${slug%-} logs=$logs/${slug%-}
# Print a hash of the code. Results are no part of it, so stages stay done when results are committed.
code() {
    find fastres kernels bench/*.py bench/lib tests setup.py pyproject.toml -type f \
        \( -name '*.py' -o -name '*.yaml' -o -name '*.toml' \) -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

mark_of() { # print the mark of the stage with this number, which differs if the stage has to run again
    local place=""
    [[ ",${needs[$1]}," != *,data,* ]] || place=$DATA_OPTION
    [[ ",${needs[$1]}," != *,table,* ]] || place+=$(sha256sum <kernels/batchnorm/fastest.json)
    sha256sum <<<"$(code) $torch $place ${commands[$1]}" | cut -c1-16
}

is_done() {
    [[ -z $again && -f $record/${names[$1]}.done && $(head -n 1 "$record/${names[$1]}.done") == "$(mark_of "$1")" ]]
}

if [[ -n $list ]]; then
    printf '%-14s %8s  %-9s  %-14s  %-5s  %s\n' stage minutes essential needs 'done' what
    total=0
    for i in "${chosen[@]}"; do
        done_yet=""
        if is_done "$i"; then done_yet=yes; fi
        printf '%-14s %8s  %-9s  %-14s  %-5s  %s\n' \
            "${names[i]}" "${minutes[i]}" "${essentials[i]}" "${needs[i]}" "$done_yet" "${whats[i]}"
        total=$((total + minutes[i]))
    done
    echo "$total minutes together on an H100: estimates, not measured"
    exit 0
fi

# ---- running ----------------------------------------------------------------------------------------------------

mkdir -p "$record" "$logs"
running=""
interrupted() {
    if [[ -n $running ]]; then # pytest needs a moment to store its results
        kill -INT -- "-$running" 2>/dev/null || true
        for _ in {1..100}; do
            kill -0 -- "-$running" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL -- "-$running" 2>/dev/null || true
    fi
    echo "run_on_gpu: interrupted; the same command continues from here" >&2
    exit 130
}
trap interrupted INT TERM

[[ $device == "no GPU" ]] || echo "$device, $torch"
results=() failures=0
for i in "${chosen[@]}"; do
    name=${names[i]} LOG=$logs/${names[i]} log=$logs/${names[i]}.log
    export LOG
    if is_done "$i"; then
        results+=("$(printf '%-14s done before' "$name")")
        echo "== $name: done before"
        continue
    fi
    echo "== $name: ${whats[i]}; about ${minutes[i]} min, output in $log"
    rm -f "$record/$name.done"
    started=$SECONDS status=0
    # Run in a process group, so that an interrupt reaches all processes. pytest stores the results that it has by then.
    set -m
    timeout --signal=INT --kill-after=60 "${limits[i]}" bash -c "${commands[i]}" >"$log" 2>&1 </dev/null &
    running=$!
    set +m
    wait "$running" || status=$?
    kill -KILL -- "-$running" 2>/dev/null || true # processes that the stage has left behind
    running="" taken=$((SECONDS - started))
    case $status in
        0)
            printf '%s\n%s\n' "$(mark_of "$i")" "$(date -u +%FT%TZ), $taken s: ${commands[i]}" >"$record/$name.done"
            results+=("$(printf '%-14s done in %d s' "$name" "$taken")")
            ;;
        124 | 137) outcome="stopped after ${limits[i]}" ;;
        *) outcome="failed with status $status after $taken s" ;;
    esac
    if ((status)); then
        failures=$((failures + 1))
        results+=("$(printf '%-14s %s: %s' "$name" "$outcome" "$log")")
        echo "   $outcome; the last lines of $log:"
        tail -n 5 "$log" | sed 's/^/   | /'
    fi
done

# ---- the end ----------------------------------------------------------------------------------------------------

echo
echo "== stages"
printf '%s\n' "${results[@]}"
if needed gpu; then
    echo
    "$PYTHON" -m bench.report || failures=$((failures + 1))
    echo "== targets"
    "$PYTHON" -m bench.report --targets || failures=$((failures + 1))
    echo
    echo "to commit: git add bench/results bench/RESULTS.md kernels/batchnorm/fastest.json"
fi
((failures == 0))
