#!/bin/bash
# A recording stand-in for Apptainer: writes down how it was called, and runs the command without any container.
{
    printf '%s\n' "$@"
    echo
} >>apptainer-calls.txt
[[ $1 == run || $1 == exec ]] || exit 64
shift
while [[ $1 == --* ]]; do
    [[ $1 == --bind ]] || exit 64
    shift 2
done
shift # the image
exec "$@"
