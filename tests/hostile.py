"""Programs that attack the sandbox: (area, program). One prints OPEN where it gets through; $path, $tcp, $udp, $abstract and $pid stand for bait outside."""

_REACH = "import os, socket\ndef reach(f):\n    try: r = f()\n    except BaseException as e: print(type(e).__name__); return\n    print('OPEN', r)\n"
_C = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(n, *a):\n    r = libc.syscall(n, *a)\n    print('OPEN' if r >= 0 else 'held', n, r)\n"
_LEAVE = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        {}\n        t = time.time()\n        while time.time() < t + 60: time.sleep(0.01)\n    os._exit(0)\n"

HOSTILE = [
    # network
    ("network", _REACH + "reach(lambda: socket.create_connection(('127.0.0.1', $tcp), 1))"),
    ("network", _REACH + "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $udp))"),
    ("network", _REACH + "reach(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + $abstract))"),
    ("network", _REACH + "reach(lambda: socket.create_connection(('8.8.8.8', 53), 0.3))"),
    ("network", _REACH + "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.sendto(b'x', ('::ffff:127.0.0.1', $udp))"),
    ("network", _REACH + "reach(lambda: socket.getaddrinfo('example.org', 80))"),
    ("network", _REACH + "reach(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))\nreach(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))\nreach(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))\nreach(lambda: socket.socket(40, socket.SOCK_STREAM))"),
    ("network", "import subprocess\nprint(subprocess.run(['bash', '-c', 'exec 3<>/dev/tcp/127.0.0.1/$tcp && echo OPEN'], capture_output=True, text=True).stdout)"),
    ("network", _REACH + "import glob\nfor p in ('/var/run/docker.sock', '/run/systemd/private', *glob.glob('/tmp/.X11-unix/*'), *glob.glob('/run/user/*/bus')): reach(lambda: socket.socket(socket.AF_UNIX).connect(p))"),
    # files and secrets
    ("files", _REACH + "reach(lambda: open($path).read())"),
    ("files", _REACH + "reach(lambda: open('/proc/1/root' + $path).read())\nreach(lambda: os.listdir('/proc/1/cwd'))"),
    ("files", _REACH + "os.symlink($path, 'l')\nreach(lambda: open('l').read())"),
    ("files", _REACH + "os.chdir('/')\nreach(lambda: open('../..' + $path).read())"),
    ("files", _REACH + "reach(lambda: os.link('/usr/bin/env', 'x'))\nreach(lambda: open('/usr/x', 'w'))\nreach(lambda: open('/x', 'w'))\nreach(lambda: os.mkdir('/job/x'))\nreach(lambda: open('/mpl/x', 'w'))"),
    ("files", _REACH + "import sys, numpy\nfor f in (numpy.__file__, os.__file__, sys.executable): reach(lambda: open(f, 'a'))\nreach(lambda: os.remove(numpy.__file__))"),
    ("files", _REACH + "import glob\nfor p in ('/', '/job', '/mpl', '/usr', '/usr/bin'): reach(lambda: os.chmod(p, 0)); reach(lambda: os.utime(p))"),
    ("files", _REACH + "reach(lambda: os.mknod('d', 0o60600, os.makedev(254, 0)) or open('d', 'rb').read(1))\nreach(lambda: os.mknod('m', 0o20600, os.makedev(1, 1)) or open('m', 'rb').read(1))"),
    ("files", _REACH + "for i in range(3, 64):\n    try: t = os.readlink(f'/proc/self/fd/{i}')\n    except OSError: continue\n    if not t.startswith(('/proc', '/dev/null')): print('OPEN', t)"),
    ("files", _C + "call(304, 3, b'a', 0)\ncall(303, -100, b'/etc/shadow', b'x'*200, b'y'*8, 0)"),  # open_by_handle_at, name_to_handle_at
    ("secrets", _REACH + "for p in ('/etc/shadow', '/etc/passwd', '/root/.ssh/id_rsa', '/root/.bash_history', '/etc/ssh/ssh_host_rsa_key'): reach(lambda: open(p).read())"),
    ("secrets", "import os\nbad = [k for k in os.environ if any(w in k.upper() for w in ('TOKEN', 'KEY', 'SECRET', 'PASS', 'SSH', 'USER', 'SUDO'))]\nprint('OPEN' if bad else 'held', bad)"),
    ("secrets", "for p in ('/proc/1/environ', '/proc/1/mem', '/proc/1/maps', '/proc/kcore', '/proc/kmsg', '/dev/mem', '/dev/kmsg'):\n    try: open(p, 'rb').read(10); print('OPEN', p)\n    except OSError as e: print(e)"),
    ("secrets", "import os\nprint(sum(p.isdigit() for p in os.listdir('/proc')))\nfor p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid() and p != '1': print('OPEN', p)"),
    ("secrets", "import gc, re\nfor o in gc.get_objects():\n    if isinstance(o, dict) and ('answer' in o or 'expected' in o): print('OPEN', o)"),
    # processes
    ("processes", "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(30); os._exit(0)\n        n += 1\nexcept OSError: print('OPEN' if n > 64 else n)"),
    ("processes", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    ("processes", "import threading, time\nn = 0\ntry:\n    while True: threading.Thread(target=time.sleep, args=(30,), daemon=True).start(); n += 1\nexcept RuntimeError: print('OPEN' if n > 64 else n)"),
    ("processes", "import subprocess\nps = [subprocess.Popen(['sleep', '60']) for _ in range(500)]"),
    ("processes", _C + "call(272, 0x10000000)\ncall(272, 0x20000)\ncall(308, 3, 0)\ncall(56, 0x10000000 | 17, 0, 0, 0, 0)\ncall(435, 0, 88)"),
    ("processes", "import subprocess\nr = subprocess.run('unshare -Ur id; mount -t tmpfs x /job; chroot / id; sudo -n id; su -c id', shell=True, capture_output=True, text=True)\nprint('OPEN' if 'uid=0' in r.stdout else 'held')"),
    ("processes", _C + "import os\ncall(101, 16, 1, 0, 0)\ncall(310, 1, 0, 0, 0, 0, 0)\ncall(438, os.pidfd_open(os.getpid()), 1, 0)"),
    # memory
    ("memory", "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    ("memory", "import os, time\nfor _ in range(30):\n    if os.fork() == 0:\n        x = bytearray(60 << 20); x[::4096] = b'x'*len(x[::4096]); time.sleep(30); os._exit(0)\ntime.sleep(30)"),
    ("memory", "import mmap, time\nx = []\nfor _ in range(100):\n    m = mmap.mmap(-1, 16 << 20); m.write(b'x'*(16 << 20)); x.append(m)\ntime.sleep(5); print('OPEN')"),
    ("memory", "import os\nfd = os.memfd_create('x')\nprint('OPEN')"),
    ("memory", "import multiprocessing.shared_memory as s, time\nx = []\nfor _ in range(200):\n    m = s.SharedMemory(create=True, size=8 << 20); m.buf[:] = b'x'*len(m.buf); x.append(m)\ntime.sleep(3); print('OPEN')"),
    ("memory", _C + "call(29, 0, 1 << 30, 0o1600)\ncall(240, b'q', 0o102, 0o600, 0)\ncall(68, 0, 0o1600)"),  # shmget, mq_open, msgget
    ("memory", "x = 'a'\nwhile True: x += x"),
    ("memory", "import numpy as np\nx = np.ones((100_000, 100_000))\nprint('OPEN')"),
    # disk
    ("disk", "f = open('big', 'wb')\nwhile True: f.write(b'x'*(1 << 20))"),
    ("disk", "import os\nn = 0\ntry:\n    for i in range(1000): open(f'f{i}', 'wb').write(b'x'*(1 << 20)); n += 1\nexcept OSError: pass\nprint('OPEN' if n > 40 else n)"),
    ("disk", "n = 0\ntry:\n    for i in range(100_000): open(f'f{i}', 'w').close(); n += 1\nexcept OSError: pass\nprint('OPEN' if n > 10_000 else n)"),
    ("disk", "import os\ntry: open('s', 'wb').truncate(1 << 40); print('OPEN')\nexcept OSError as e: print(e)"),
    ("disk", "import os\ntry:\n    for i in range(5000): os.mkdir('d'); os.chdir('d')\nexcept OSError as e: print(e)"),
    ("disk", "import tempfile, os\nfor d in ('/tmp', '/dev/shm', '/var/tmp', '.'):\n    try:\n        with open(d + '/x', 'wb') as f: [f.write(b'x'*(1 << 20)) for _ in range(200)]\n        print('OPEN', d)\n    except OSError as e: print(e)"),
    # output
    ("output", "while True: print('x'*10_000)"),
    ("output", "import sys\nwhile True: sys.stderr.write('x'*10_000)"),
    ("output", "import os\nwhile True: os.write(1, b'\\0\\xff'*50_000)"),
    ("output", "import os\nos.ftruncate(1, 1 << 40)\nprint('x')"),
    ("output", "import os, sys\nif os.fork() == 0:\n    while True: os.write(1, b'y'*4096)\nprint('done')"),
    # time
    ("time", "while True: pass"),
    ("time", "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass"),
    ("time", "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: time.sleep(1)"),
    ("time", "import re\nre.match('(a+)+$', 'a'*60 + 'b')"),
    ("time", "x = 9**9**9"),
    ("time", "import atexit, time\natexit.register(time.sleep, 1000)"),
    ("time", "import os, signal\nif os.fork() == 0: os.kill(os.getppid(), signal.SIGSTOP)\nwhile True: pass"),
    ("time", "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()"),
    # signals
    ("signals", _REACH + "import signal\nreach(lambda: os.kill($pid, 0))\nreach(lambda: os.kill($pid, signal.SIGTERM))"),
    ("signals", "import os, signal\nfor s in (9, 19, 15, 2, 10, 29):\n    try: os.kill(1, s)\n    except OSError: pass\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass\nprint('alive')"),
    ("signals", "import os\nos.kill(-1, 9)"),
    ("signals", "import os\nos.killpg(0, 9)"),
    ("signals", _C + "import os, struct\nold = ctypes.create_string_buffer(16)\nfor p in (1, os.getppid()): call(302, p or 1, 7, struct.pack('QQ', 0, 0), old)"),  # prlimit on the server
    ("signals", _C + "call(141, 0, 1, 19)\ncall(203, 1, 8, b'\\1' + b'\\0'*7)\ncall(144, 1, 0, b'\\0'*4)\ncall(251, 1, 1, 0)"),  # setpriority, affinity, scheduler, ioprio of the server
    # daemons
    ("daemons", _LEAVE.format("pass")),
    ("daemons", _LEAVE.format("os.close(0); os.close(1); os.close(2)")),
    ("daemons", "import subprocess\nsubprocess.Popen('nohup sh -c \"while true; do sleep 0.1; done\" &', shell=True)"),
    ("daemons", "import os\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid()"),
    ("daemons", "import multiprocessing as m, time\nm.Process(target=time.sleep, args=(60,), daemon=True).start()\nimport os; os._exit(0)"),
    # descriptors
    ("descriptors", "import os\nfor i in range(3, 1000):\n    try: os.fstat(i); print('OPEN', i)\n    except OSError: pass"),
    ("descriptors", "import os\nx = []\ntry:\n    while True: x.append(os.pipe())\nexcept OSError: print('OPEN' if len(x) > 200 else 'held')"),
    ("descriptors", "import os, socket\nfor i in range(3, 300):\n    try: socket.socket(fileno=i).send(b'{\"status\": 0}'); print('OPEN', i)\n    except OSError: pass"),
    # environment and the grader
    ("grader", "import sys\nf = sys._getframe()\nwhile f:\n    for k, v in f.f_locals.items():\n        if 'answer' in k or 'expected' in k: print('OPEN', k)\n    f = f.f_back"),
    ("grader", "import os, builtins, sys\nos._exit = lambda c: None\nsys.exit = lambda *a: None\nbuiltins.print = lambda *a: None\nraise ValueError('still an exception')"),
    ("grader", "print('{\"status\": 0, \"killed\": null, \"error\": null}')\nimport os; os.write(2, b'R'); raise SystemExit(7)"),
    ("grader", "import sys, json, os\nfor m in list(sys.modules): sys.modules[m] = None"),
    ("grader", "import numpy, pandas\nnumpy.sum = lambda *a, **k: 42\npandas.DataFrame.sum = None\nprint('poisoned')"),
    ("grader", "import ctypes\nctypes.string_at(0)"),
    ("grader", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"),
    ("grader", "import resource\nfor r in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):\n    try: resource.setrlimit(r, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); print('OPEN', r)\n    except (ValueError, OSError): pass"),
    ("grader", _C + "call(157, 22, 0, 0, 0, 0)\ncall(317, 1, 0, 0)\ncall(126, b'\\x22\\x05\\x08\\x20' + b'\\0'*4, b'\\xff'*24)\ncall(105, 0)\ncall(425, 4, b'\\0'*120)\ncall(321, 0, b'\\0'*120, 120)\ncall(323, 1)\ncall(250, 0, 0, 0)\ncall(248, b'user', b'a', b'b', 1, -3)"),
    # links and special files in outputs
    ("outputs", "import os\nos.symlink($path, 'answer.txt')\nos.symlink('/etc/shadow', 'shadow.png')\nos.symlink('/', 'root')"),
    ("outputs", "import os, socket\nos.mkfifo('pipe')\ns = socket.socket(socket.AF_UNIX); s.bind('sock')"),
    ("outputs", "import os\nos.symlink('loop', 'loop')\nos.mkdir('a'); os.symlink('..', 'a/up')"),
    ("outputs", "for i in range(2000): open(f'out{i}.png', 'wb').write(b'x')"),
    ("outputs", "open(b'\\xff\\xfe\\n'.decode('latin1'), 'w').write('x')\nimport os\nos.close(os.open(b'\\xff\\n\\x1b[2J', os.O_CREAT | os.O_WRONLY))"),
    ("outputs", "import os\nopen('a', 'w').write('x'); os.chmod('a', 0)\nos.mkdir('b'); open('b/c', 'w').write('x'); os.chmod('b', 0); os.chmod('.', 0)"),
    ("outputs", "import os\nos.rename('../work', '../gone')\nos.symlink('/', '../work')"),
    # state for the next program
    ("state", "import os, tempfile\nfor d in ('.', tempfile.gettempdir(), '/tmp', '/dev/shm', '/var/tmp', os.path.expanduser('~')):\n    try: open(os.path.join(d, 'left-behind'), 'w').write('left-behind')\n    except OSError: pass"),
    ("state", "import os\nsecret = 'left-' + 'in-memory-of-this-program'\nos.environ['LEFT'] = secret\nprint(len(secret))"),
    ("state", "import os\nfor d in ('.', '/tmp', '/dev/shm', '/var/tmp'):\n    if os.path.exists(d + '/left-behind'): print('OPEN', d)\nif 'LEFT' in os.environ: print('OPEN')\n"
              "import re\nwith open('/proc/self/maps') as m, open('/proc/self/mem', 'rb', 0) as f:\n    for line in m:\n        a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
              "        if 'r' != line.split()[1][0] or b - a > 1 << 28: continue\n        try: f.seek(a); data = f.read(b - a)\n        except (OSError, ValueError, OverflowError): continue\n"
              "        if re.search(rb'[\\x27]left-[\\x27] [+] [\\x27]in-memory-of|left-in-mem[o]ry-of', data): print('OPEN', line)"),
]

HONEST = "import numpy as np, pandas as pd, os, sys\nprint(int(np.sum([1, 2, 3])), int(pd.DataFrame({'a': [4, 5]}).sum().a), sorted(os.listdir('.')), len(sys.argv))"


def run_all(box, programs=HOSTILE, limits=None):
    """Attack `box`; a list of (number, area, what was wrong, outcome), empty if everything was contained."""
    from slm_study.evaluation import worker
    from slm_study.evaluation.jail import VERDICTS, Limits
    from slm_study.evaluation.jail import bait
    limits, wrong = limits or Limits(seconds=1, memory_mib=256), []
    box.run("print(1)")
    with bait(box.scratch) as (told, secret, touched):
        for n, (area, program) in enumerate(programs):
            for k, v in told.items(): program = program.replace(f"${k}", repr(v))
            lim = limits if area != "state" else Limits(seconds=20) # looking through all memory takes its time
            out = box.run(program, limits=lim)
            said = out.stdout + out.stderr + "".join(map(str, out.files.values()))
            left = [p for w in box.pool for p in worker.tree(w.process.pid) if p not in w.pids]
            after = box.run(HONEST)
            for what, bad in {"got through": "OPEN" in out.stdout, "secret read": secret in said or "root:" in said, "bait reached": touched(), "processes left": left,
                              "no verdict": out.verdict not in VERDICTS or out.verdict == "infrastructure_error", "next program": (after.verdict, after.stdout) != ("ok", "6 9 ['program.py'] 1\n"),
                              "too long": out.seconds > lim.seconds*box.factor + 1, "too much kept": sum(map(len, out.files.values())) > limits.file_mib << 20 or len(out.stdout) > 65536}.items():
                if bad: wrong.append((n, area, what, out, after))
    return wrong


if __name__ == "__main__":
    import sys
    from slm_study.evaluation.sandbox import Sandbox
    with Sandbox(workers=1, tier=sys.argv[1] if len(sys.argv) > 1 else None, calibrate=False) as box:
        wrong = run_all(box)
        print(f"tier {box.tier.name} {box.tier.layers}: {len(HOSTILE)} programs, {len({w[0] for w in wrong})} not contained")
        for n, area, what, out, after in wrong: print(n, area, what, "|", out.verdict, repr(out.stdout[-150:]), repr(out.stderr[-150:]), "|", after.verdict if what == "next program" else "", repr(HOSTILE[n][1][-90:]))
