#!/usr/bin/env bash
# Builds the emulated driver with the kernels in it.
#   build.sh OUT_DIR [--asan] [FILE.cu ...]
# makes OUT_DIR/libcuda.so.1 and the link libcuda.so from kernels-cu/*/*.cu, or from the files given.
# CXX: the compiler (g++).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$(dirname "$here")
CXX=${CXX:-g++}
flags=(-std=c++17 -O2 -g1 -ffp-contract=off -fPIC -fvisibility=hidden -fno-gnu-unique -fno-extern-tls-init
    -fno-strict-aliasing -fsanitize=alignment -fno-sanitize-recover=alignment -pthread -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function -Wno-psabi
    -I "$here/include" -I "$kernels/common" -I "$kernels")
language=(-x c++ -include "$here/emulator.h")
lower() { if command -v nice >/dev/null; then nice -n 5 "$@"; else "$@"; fi; }

# The kernels in a .cu: lines `name (launch bounds) (cluster dims)`, then whether there are static `__shared__`
# variables, and any at all.
scan() {
    "$CXX" "${flags[@]}" "${language[@]}" -DHYWU_SCAN -E -P "$1" | tr '\n\t' '  ' | awk '
    {
        n = split($0, part, "__hywu_kernel__")
        for (i = 2; i <= n; i++) {
            if (part[i - 1] !~ /extern *"C" *$/) continue
            text = part[i]; bound = cluster = "()"
            while (match(text, /^[^(]*__hywu_(bounds|cluster)__ *\(/)) {
                is_bound = substr(text, 1, RLENGTH) ~ /__hywu_bounds__ *\($/
                rest = substr(text, RLENGTH); depth = 0
                for (j = 1; j <= length(rest); j++) {
                    c = substr(rest, j, 1)
                    if (c == "(") depth++
                    if (c == ")" && --depth == 0) break
                }
                argument = substr(rest, 1, j)
                gsub(/ /, "", argument)
                if (is_bound) bound = argument; else cluster = argument
                text = substr(rest, j + 1)
            }
            # A tensor map by value has to stay in the memory of the parameters.
            parameters = text
            sub(/\).*/, "", parameters)
            count = split(parameters, parameter, /[,(]/)
            for (j = 2; j <= count; j++) {
                if (parameter[j] !~ /CUtensorMap/ || parameter[j] ~ /[*&]/ || parameter[j] ~ /__hywu_constant__/) continue
                print "build.sh: a tensor map without __grid_constant__:" parameter[1] > "/dev/stderr"
                exit 1
            }
            sub(/\(.*/, "", text)
            gsub(/ +$/, "", text)
            m = split(text, word, /[^A-Za-z0-9_]+/)
            print word[m], bound, cluster
        }
        named = /__hywu_shared__/ ? "true" : "false"
        gsub(/extern *__hywu_shared__/, "")
        print "shared", (/__hywu_shared__/ ? "true" : "false") ", " named
    }'
}

# Compiles one .cu with the registration of its kernels into an object without global symbols, since two
# modules of a device may use the same names.
unit() {
    local source=$1 object=$2 base=${2%.o} name
    name=$(basename "$source" .cu)
    scan "$source" >"$base.names"
    {
        echo "#include \"$source\""
        local shared
        shared=$(sed -n 's/^shared //p' "$base.names")
        echo "static const bool hywu_registered = [] {"
        awk -v unit="$name" -v shared="$shared" '$1 != "shared" {
            printf "    emu::add<%s>(\"%s\", \"%s\", emu::bounds%s, dim3%s, %s);\n", $1, unit, $1, $2, $3, shared
        }' "$base.names"
        echo "    return true;"
        echo "}();"
    } >"$base.gen.cpp"
    lower "$CXX" "${flags[@]}" "${language[@]}" -Wno-unused-variable -c "$base.gen.cpp" -o "$base.raw.o"
    ld -r --force-group-allocation "$base.raw.o" -o "$base.all.o"
    objcopy --keep-global-symbol=none "$base.all.o" "$object"
    rm -f "$base.raw.o" "$base.all.o"
}

part() { lower "$CXX" "${flags[@]}" -c "$1" -o "$2"; }

out=
asan=
files=()
step=
for argument in "$@"; do
    case $argument in
    --asan) asan=--asan ;;
    --unit | --part) step=${argument#--} ;;
    *) if [ -z "$out" ]; then out=$argument; else files+=("$argument"); fi ;;
    esac
done
if [ -z "$out" ]; then
    echo "usage: build.sh OUT_DIR [--asan] [FILE.cu ...]" >&2
    exit 2
fi
if [ -n "$asan" ]; then flags+=(-fsanitize=address -fno-omit-frame-pointer); fi
if [ -n "$step" ]; then # called from below: OUT_DIR is the object
    "$step" "${files[0]}" "$out"
    exit
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
objects=$out/objects${asan:+-asan}
mkdir -p "$objects"
exec 9>"$out/lock"
if command -v flock >/dev/null; then flock 9; fi

if [ ${#files[@]} = 0 ]; then
    for f in "$kernels"/*/*.cu; do
        case $f in "$here"/*) ;; *) [ -e "$f" ] && files+=("$f") ;; esac
    done
fi

# Any change of a header, of this script or of the flags compiles everything again.
stamp=$objects/stamp
newer=$([ ! -e "$stamp" ] || find "$kernels" \
    \( -name '*.h' -o -name '*.cuh' -o -name '*.hpp' -o -name build.sh \) -newer "$stamp" -print -quit)
if [ "$(cat "$stamp" 2>/dev/null)" != "$CXX ${flags[*]}" ] || [ -n "$newer" ]; then
    rm -f "$objects"/*.o
    echo "$CXX ${flags[*]}" >"$stamp"
fi

list=()
jobs=()
for f in "${files[@]}"; do
    f=$(cd "$(dirname "$f")" && pwd)/$(basename "$f")
    object=$objects/$(echo "${f%.cu}" | sed "s|^$kernels/||; s|/|.|g").o
    list+=("$object")
    if [ ! -e "$object" ] || [ "$f" -nt "$object" ]; then jobs+=("$object" --unit "$f"); fi
done
for f in "$here"/*.cpp; do
    object=$objects/emulator.$(basename "$f" .cpp).o
    list+=("$object")
    if [ ! -e "$object" ] || [ "$f" -nt "$object" ]; then jobs+=("$object" --part "$f"); fi
done

library=$out/libcuda.so.1
if [ ${#jobs[@]} -gt 0 ]; then
    printf '%s\0' "${jobs[@]}" | xargs -0 -n 3 -P "$(nproc)" "${BASH_SOURCE[0]}" $asan
fi

twice=$(for o in "${list[@]}"; do
    [ ! -e "${o%.o}.names" ] || awk '$1 != "shared" { print $1 }' "${o%.o}.names"
done | sort | uniq -d)
if [ -n "$twice" ]; then
    echo "build.sh: two kernels of the same name:" $twice >&2
    exit 1
fi

# What was linked before, and whether a part of it is newer.
linked=$(cat "$out/linked" 2>/dev/null || true)
if [ ! -e "$library" ] || [ "$linked" != "$asan ${list[*]}" ] || [ ${#jobs[@]} -gt 0 ]; then
    echo '{ global: cu*; local: *; };' >"$objects/exports"
    lower "$CXX" "${flags[@]}" -shared -Wl,-z,nodelete -Wl,-soname,libcuda.so.1 -Wl,-Bsymbolic \
        -Wl,--version-script="$objects/exports" "${list[@]}" -ldl -o "$library.new"
    mv "$library.new" "$library"
    ln -sf libcuda.so.1 "$out/libcuda.so"
    echo "$asan ${list[*]}" >"$out/linked"
fi
