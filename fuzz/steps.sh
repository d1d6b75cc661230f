# Read by run.sh and rounds.sh.

# How many executions of a target, of so many, one process may do: a hostile template may keep a thread and its memory for ever, after
# which no more templates are run, so that its target begins anew now and then.
step() { # TARGET LEFT
  [ "$1" = chat_template ] && [ "$2" -gt 20000 ] && echo 20000 || echo "$2"
}
