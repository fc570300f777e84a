r"""The isolated grader: untrusted answers are compared in processes that can be killed.

An answer written by a policy is hostile input. `9^{9^{9^9}}` fills the memory, `10000000!` runs
for minutes inside one C call, and fifty nested parentheses keep a parser busy for an hour. Neither
an exception nor a signal handler stops C code, and both fail off the main thread. What always works
is to end the process. So:

1. A worker is a separate Python process. It reads one JSON line [gold, answer] from its standard
   input and writes one JSON line, the verdict, back.
2. The parent waits at most `deadline` seconds for that line, then kills the worker and starts
   another in its place. The answer scores 0 and is counted in `Pool.broken`.
3. A worker limits its own memory, and arms a kernel timer with the default action (death), so that
   it ends even if its parent has been killed and nobody is left to wait for it.
4. A worker without a parent reads end-of-file and leaves.
5. A worker refuses to compile text (so there is no eval), to start programs and to open connections.

The workers are started as `python grader.py --worker`, not through multiprocessing: the spawn
method would import the user's __main__ module (train.py, with torch and a GPU context) into each
of them, and fork is unsafe beside CUDA and threads. Nothing starts before the first question.

    python grader.py      an ordinary pair, one that would run for ever, and an ordinary one again
"""

import atexit
import json
import os
import queue
import selectors
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

DEADLINE = 5.0          # seconds; ordinary pairs take milliseconds, the first of their kind up to half a second
START = 120.0           # seconds a worker may take to import sympy on a cold, busy disk
MEMORY = 768 * 2**20    # bytes of address space; a worker that has imported sympy has about 100 MiB


class Worker:
    """One process that compares pairs. `ask` returns the verdict, or None if it had to be broken off."""

    def __init__(self, deadline, memory):
        self.deadline = deadline
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(deadline), str(memory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        start_new_session=True)     # signals to its parent's group are not for it
        ready = self._line(START)
        if ready != "ready":
            self.kill()
            raise RuntimeError(f"a grader worker could not start: {ready or 'no word from it'}")

    def _line(self, seconds):
        """The next line the worker writes, or None if it dies or stays silent for too long."""
        with selectors.DefaultSelector() as selector:      # select.select cannot watch file 1024 and above
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def ask(self, gold, answer):
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
            return self._line(self.deadline)
        except (BrokenPipeError, ValueError):
            return None

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Up to `size` workers, started when first needed. Any thread may call `ask` and `map`."""

    def __init__(self, size=None, deadline=DEADLINE, memory=MEMORY):
        self.size, self.deadline, self.memory = size or default_size(), deadline, memory
        self.broken = 0                        # answers broken off: deadline, memory or crash
        self.idle = queue.LifoQueue()          # last used first: an easy batch warms one worker only
        for _ in range(self.size):
            self.idle.put(None)                # a place without a worker yet
        atexit.register(self.close)

    def ask(self, pair):
        """True or False for one (gold, answer). False, counted, when it had to be broken off."""
        worker = self.idle.get()
        try:
            if worker and worker.process.poll() is not None:     # died of something else, while idle
                worker.kill()
                worker = None
            worker = worker or Worker(self.deadline, self.memory)
            verdict = worker.ask(*pair)
            if verdict is None:
                self.broken += 1
                worker.kill()
                worker = None
            return verdict is True
        finally:
            self.idle.put(worker)

    def map(self, pairs):
        """The verdicts of many pairs, in order, as many at a time as there are workers."""
        if len(pairs) < 2:
            return [self.ask(pair) for pair in pairs]
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(self.ask, pairs))

    def close(self):
        """End every idle worker. Their places stay, so the pool can be used again."""
        workers = []
        while not self.idle.empty():
            workers.append(self.idle.get_nowait())
        for worker in workers:
            if worker:
                worker.kill()
            self.idle.put(None)


def default_size():
    """Workers of a process: as many as it has cores, which parallel.keep_apart divides among the ranks of a machine, at most 8."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, own))


# ---------------------------------------------------------------------------- inside the worker

def limit_memory(size):
    """Beyond `size` bytes allocations fail with MemoryError. macOS accepts no such limit; there the
    deadline alone bounds what a worker can take."""
    import resource
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):
        pass


def forbid():
    """From here on this process compiles no text and starts no program and no connection, whatever a library
    is led to do with a model's answer. Imports, which run compiled files, still work."""
    def guard(event, details):
        text = event == "compile" and str(details[1]).startswith("<")      # eval, exec and compile of a string
        if text or event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            raise PermissionError(event)
    sys.addaudithook(guard)


def serve(deadline, memory):
    """Answer questions from standard input until it ends."""
    import signal
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                              # what libraries print must not reach the parent
    for number in (signal.SIGINT, signal.SIGTERM):   # the parent's business: it finishes its step, and needs the verdicts
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)    # default action: the kernel ends this process
    say = lambda value: print(json.dumps(value), file=channel, flush=True)
    try:
        from algebra import equivalent
        limit_memory(memory)
        forbid()
        assert equivalent(r"\frac{x}{2}+1.5", "(x+3)/2")      # also builds the parser's tables
    except BaseException as error:
        return say(f"{type(error).__name__}: {error}")
    say("ready")
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline + 1)   # the parent comes first, if it lives
        try:
            verdict = equivalent(gold, answer)
        except MemoryError:
            verdict = None                     # the parent replaces this process: its heap is torn
        except BaseException:                  # math-verify's TimeoutException is a BaseException
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(verdict)


def main():
    pool = Pool(size=1, deadline=1.0)
    for gold, answer in [("x+1", "1+x"), ("x+1", "x+2"), ("25", r"\binom{10^9}{5 \cdot 10^8}"), ("x+1", "1+x")]:
        start = time.perf_counter()
        verdict = pool.ask((gold, answer))
        print(f"{gold:5} {answer:28} {verdict!s:6} {time.perf_counter() - start:6.3f} s, {pool.broken} broken off")


if __name__ == "__main__":
    serve(float(sys.argv[2]), int(sys.argv[3])) if sys.argv[1:2] == ["--worker"] else main()
