#!/bin/bash
@HEADER@
# Written by aiida-marketplace-hpc: makes the folder what AiiDA wants it to be, runs AiiDA's script @SCRIPT@, and leaves
# records of it in the files mphpc-*. It runs at most once: whichever copy makes the folder mphpc-lock is the one.
mphpc_signals='HUP INT QUIT USR1 USR2 ALRM TERM XCPU'
mphpc_id=${SLURM_JOB_ID:-$$}
mphpc_id=${mphpc_id//[!A-Za-z0-9]/-}
mphpc_beat=@BEAT@
mphpc_limit=@LIMIT@
mphpc_size=@PIECE@
mphpc_here=$PWD
mphpc_child= mphpc_cause= mphpc_told= mphpc_terms=0

# As few processes as can be: between SIGTERM and SIGKILL there may be seconds, on a busy node.
mphpc_time() { printf -v mphpc_now '%(%s)T' -1; }

# The manifest: fields that end in NUL bytes, as base64, in pieces that the gateway hands out. First E (entry) lines for all
# that is in the folder, then R (retrieved) lines for what AiiDA will ask for, with digests, through links, and with the
# number of pieces where it cannot be handed out as it is. A Z says that it is whole.
mphpc_list() {
    LC_ALL=C find . -mindepth 1 \( -path './mphpc-*' -o -path ./job.sh \) -prune -o \
        -printf 'E\0%y%Y\0%m\0%s\0%T@\0%P\0%l\0' 2>/dev/null
    shopt -u nullglob failglob
    local LC_ALL=C match kind mode size time path digest number=0 pieces
    declare -A seen=()
    for match in "$@"; do
        [ -e "$match" ] || continue
        find -L "$match" \( -path './mphpc-*' -o -path ./job.sh \) -prune -o \( -type f -o -type d \) \
            -printf '%y\0%m\0%s\0%T@\0%p\0' 2>/dev/null
    done | while IFS= read -r -d '' kind && IFS= read -r -d '' mode && IFS= read -r -d '' size &&
        IFS= read -r -d '' time && IFS= read -r -d '' path; do
        [ -z "${seen[$path]+seen}" ] || continue
        seen[$path]=1 digest= pieces=
        if [ "$kind" = f ]; then
            case $path in *[!A-Za-z0-9_./,=@:~%+-]*) pieces=yes ;; esac
            [ "$size" -le "$mphpc_size" ] || pieces=yes
            if [ -n "$pieces" ]; then
                number=$((number + 1)) pieces=$((number))
                split -b "$mphpc_size" -a 6 -d -- "$path" "mphpc-out-$number-" || continue
                digest=$(cat "mphpc-out-$number-"* 2>/dev/null | sha256sum)
                size=$(cat "mphpc-out-$number-"* 2>/dev/null | wc -c)
            elif [ "$path" -ef /proc/$$/fd/1 ] || [ "$path" -ef /proc/$$/fd/2 ]; then
                size= # Slurm itself may still write to it.
            else
                digest=$(sha256sum < "$path")
            fi
            digest=${digest%% *}
        fi
        printf 'R\0%s\0%s\0%s\0%s\0%s\0%s\0%s\0' "$kind" "$mode" "$size" "$time" "${path#./}" "$digest" "$pieces"
    done
    printf 'Z\0'
}

# STATE, exit code, reason: leave the records and end.
mphpc_end() {
    trap '' $mphpc_signals
    : > "mphpc-ending-$1-$2"
    mphpc_list @RETRIEVED@ | base64 -w 0 | split -b "$mphpc_size" -a 6 -d - mphpc-manifest-
    mphpc_time
    local pieces
    pieces=(mphpc-manifest-*)
    [ -e "${pieces[0]}" ] || pieces=()
    printf '%s\n' "$1" "$2" "${mphpc_began:-$mphpc_now}" "$mphpc_now" "${#pieces[@]}" "$mphpc_id" "${3//$'\n'/ }" > mphpc-end
    : > "mphpc-ended-$1-$2-${mphpc_began:-$mphpc_now}-$mphpc_now-${#pieces[@]}"
    [ -z "${mphpc_watch-}" ] || kill -KILL -- "-$mphpc_watch" 2>/dev/null
    exit "$2"
}

# The job's folder cannot be made what it should be: nothing of AiiDA's script is run.
mphpc_stop() {
    [ -z "$mphpc_cause" ] || mphpc_end "$mphpc_cause" 143 'it was cancelled before its script began'
    printf 'marketplace-hpc: the job script was not run: %s\n' "$1" >&2
    mphpc_end UNPREPARED 74 "$1"
}

mphpc_hear() {
    mphpc_told=$1
    if [ "$1" != TERM ]; then
        [ -z "$mphpc_child" ] || kill "-$1" "$mphpc_child" 2>/dev/null
        return
    fi
    mphpc_terms=$((mphpc_terms + 1))
    if [ -z "$mphpc_cause" ]; then
        mphpc_cause=CANCELLED
        if [ ! -e mphpc-cancel ]; then
            mphpc_time
            if [ -n "${SLURM_JOB_END_TIME-}" ]; then
                [ "$mphpc_now" -lt $((SLURM_JOB_END_TIME - 2)) ] || mphpc_cause=TIMEOUT
            elif [ -n "$mphpc_limit" ]; then
                [ $((mphpc_now - mphpc_began + 2)) -lt "$mphpc_limit" ] || mphpc_cause=TIMEOUT
            fi
        fi
        : > "mphpc-ending-$mphpc_cause"
    fi
    if [ -n "$mphpc_child" ]; then
        kill -TERM -- "-$mphpc_child" 2>/dev/null
        [ "$mphpc_terms" -lt 4 ] || kill -KILL -- "-$mphpc_child" 2>/dev/null
    fi
}

# Parts of the folder; each ends the job if it cannot be made.
mphpc_above() { case $1 in */*) mkdir -p -- "./${1%/*}" || mphpc_stop "the folder of $1 cannot be made" ;; esac; }
mphpc_place() {
    [ -z "$2" ] || chmod "$2" mphpc-new || mphpc_stop "$1 cannot be made"
    mphpc_above "$1"
    mv -f -T -- mphpc-new "./$1" || mphpc_stop "$1 cannot be made"
}
mphpc_dir() { mkdir -p -- "./$1" || mphpc_stop "the folder $1 cannot be made"; }
mphpc_mode() { chmod "$2" -- "./$1" || mphpc_stop "the mode of $1 cannot be set"; }
mphpc_text() {
    base64 -d > mphpc-new || mphpc_stop "$1 cannot be written: is the disk full?"
    mphpc_place "$1" "$2"
}
mphpc_pack() { # digest, pieces…: the small files, one after the other
    local digest=$1 found
    shift
    cat -- "$@" > mphpc-pack || mphpc_stop 'the small files cannot be joined: is the disk full?'
    found=$(sha256sum < mphpc-pack)
    [ "${found%% *}" = "$digest" ] || mphpc_stop 'the small files are not what was uploaded'
    rm -f -- "$@"
}
mphpc_unpack() { # path, mode, offset, size
    tail -c "+$(($3 + 1))" mphpc-pack | head -c "$4" > mphpc-new || mphpc_stop "$1 cannot be written: is the disk full?"
    mphpc_place "$1" "$2"
}
mphpc_join() { # path, mode, digest, pieces…
    local path=$1 mode=$2 digest=$3 found
    shift 3
    cat -- "$@" > mphpc-new || mphpc_stop "$path cannot be joined: is the disk full?"
    found=$(sha256sum < mphpc-new)
    [ "${found%% *}" = "$digest" ] || mphpc_stop "$path is not what was uploaded"
    mphpc_place "$path" "$mode"
}
mphpc_link() {
    mphpc_above "$2"
    ln -s -T -- "$1" "./$2" || mphpc_stop "the link $2 cannot be made"
}
mphpc_copy() { # -P (links stay links) or -L, whether it must be there, source, target
    local name
    if [ ! -e "$3" ] && [ ! -L "$3" ]; then
        [ -z "$2" ] || mphpc_stop "$3, which was to be copied, is not there any more"
        printf 'marketplace-hpc: %s, which was to be copied, is not there\n' "$3" >&2
        return
    fi
    mphpc_above "$4"
    if [ -d "$3/mphpc-lock" ]; then
        # All of another job's folder, but not the records of that job.
        mkdir -p -- "./$4" || mphpc_stop "the folder $4 cannot be made"
        for name in "$3"/* "$3"/.[!.]* "$3"/..?*; do
            case ${name##*/} in mphpc-* | job.sh) continue ;; esac
            [ -e "$name" ] || [ -L "$name" ] || continue
            cp -R -p "$1" -- "$name" "./$4/" || mphpc_stop "$name cannot be copied"
        done
    else
        cp -R -p -T "$1" -- "$3" "./$4" || mphpc_stop "$3 cannot be copied"
    fi
}
mphpc_into() { # the same for all that matches a pattern, into a folder
    local how=$1 target=$2 source
    shift 2
    for source in "$@"; do mphpc_copy "$how" '' "$source" "$target/${source##*/}"; done
}
mphpc_links() {
    local target=$1 source
    shift
    for source in "$@"; do
        [ ! -e "$source" ] || mphpc_link "$source" "$target/${source##*/}"
    done
}

if ! mkdir mphpc-lock 2>/dev/null; then
    if [ ! -d mphpc-lock ]; then
        printf 'marketplace-hpc: cannot write to %s: the folder is gone, read-only or full\n' "$PWD" >&2
        exit 73
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && [ -e "mphpc-started-$mphpc_id" ] && ! ls | grep -q '^mphpc-ended-'; then
        mphpc_began=$(sed -n 4p mphpc-start)
        mphpc_end NODE_FAIL 75 'the scheduler started the job again after its node had failed; it is not run twice'
    fi
    printf 'marketplace-hpc: job %s is a second copy: it ends before the job script\n' "$mphpc_id" >&2
    exit 75
fi
for mphpc_signal in $mphpc_signals; do trap "mphpc_hear $mphpc_signal" "$mphpc_signal"; done
mphpc_time
mphpc_began=$mphpc_now
[ ! -e mphpc-cancel ] || mphpc_end CANCELLED 143 'it was cancelled before it started'
printf '%s\n' "$HOSTNAME" "$mphpc_here" "$mphpc_id" "$mphpc_began" > mphpc-start ||
    mphpc_stop 'the folder cannot be written: is the disk full?'
: > "mphpc-started-$mphpc_id"
set -m
(
    trap '' $mphpc_signals
    while kill -0 $$ 2>/dev/null; do
        printf . >> "mphpc-beat-$mphpc_beat"
        [ ! -e mphpc-cancel ] || kill -TERM $$
        sleep "$mphpc_beat"
    done
) < /dev/null > /dev/null 2>&1 &
mphpc_watch=$!
set +m

@FOLDER@

[ -z "$mphpc_cause" ] || mphpc_end "$mphpc_cause" 143 'it was cancelled before its script began'
set -m
@COMMAND@ <&0 &
mphpc_child=$!
set +m
exec 9>&2 2> /dev/null # What this shell says about its child has no place in the output of the job.
[ -z "$mphpc_told" ] || mphpc_hear "$mphpc_told"
while
    mphpc_told=
    wait "$mphpc_child"
    mphpc_status=$?
    [ -n "$mphpc_told" ]
do
    # A signal that interrupts `wait` just when the child ends makes bash lose the child, for which it then waits for ever.
    if ! kill -0 "$mphpc_child" 2> /dev/null && [[ $'\n'$(jobs -rp)$'\n' == *$'\n'$mphpc_child$'\n'* ]]; then
        mphpc_status=$((128 + $(kill -l "$mphpc_told")))
        break
    fi
done
exec 2>&9 9>&-
if [ -n "$mphpc_cause" ]; then
    mphpc_end "$mphpc_cause" "$mphpc_status" ''
elif [ "$mphpc_status" = 0 ]; then
    mphpc_end COMPLETED 0 ''
fi
mphpc_end FAILED "$mphpc_status" ''
