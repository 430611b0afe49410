#!/bin/sh
# Print the first Python that the CPU stack's locks are for (3.11, 3.12, 3.13) and that can make a virtual environment.
# 3.11 comes first. A name on PATH may be a shim that starts nothing, so each is tried.
check='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
for python in python3.11 "$HOME"/.pyenv/versions/3.11*/bin/python \
  python3 python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
  if "$python" -c "$check" >/dev/null 2>&1; then
    "$python" -c 'import sys; print(sys.executable)'
    exit 0
  fi
done
echo "Python 3.11, 3.12 or 3.13 with its venv module is needed: apt-get install python3.11 python3.11-venv, or PYTHON=..." >&2
exit 2
