#!/bin/bash
# One rank: its output goes into a log of its own, that of rank 0 to the terminal as well. Becomes python.
log=$ANIMA_LOG_DIR/rank-$RANK.log
if [ "$RANK" = 0 ]; then
    exec > >(trap '' INT TERM; exec tee -a "$log") 2>&1
else
    exec >> "$log" 2>&1
fi
exec python -u "$@"
