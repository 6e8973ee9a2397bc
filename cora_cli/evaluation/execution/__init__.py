"""Run generated programs against the tests of their problems, in a sandbox: `pass@k` and the fate of each program.

`problems` reads tests from records, `sandbox` and `seccomp` shut a process in, `inside/` is what runs there, `run` watches it and names the
fate, and `score` goes over the samples of every problem.
"""
