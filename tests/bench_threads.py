"""What threads and a busy neighbour do to five kinds of work, each in processes of its own."""
import json, os, statistics, subprocess, sys, time
from pathlib import Path

from bench import noise, report

WAITING = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "passive"}}


def works():
    "What is timed, by name; each made ready."
    import torch
    from bench_rooms import SIZE, points
    from ssl_nb.acoustics.geometry import robot_head_array
    from ssl_nb.acoustics.rooms import Room, rirs
    from ssl_nb.classical.gcc_phat import gcc_phat
    from ssl_nb.classical.steered_power import SteeredPower, direction_grid
    from ssl_nb.end_to_end.waveform_nets import WaveformCNN
    room, (source, mics) = Room(SIZE, 0.3), points(30)
    frames = noise(20, 12, 4096)
    steered = SteeredPower(robot_head_array(), direction_grid(64, 32), 16000)
    net, audio, places = WaveformCNN(4, 3), noise(16, 4, 16000), noise(16, 3)
    step = torch.optim.Adam(net.parameters())
    def train():
        step.zero_grad()
        (net(audio) - places).square().mean().backward()
        step.step()
    return {"image RIRs": lambda: rirs(room, source, mics[:10], method="image"),
            "hybrid RIRs": lambda: rirs(room, source, mics, method="hybrid"),
            "GCC-PHAT": lambda: gcc_phat(frames, max_lag=32), "SRP maps": lambda: steered(frames),
            "training step": train}


def time_them():
    "Median milliseconds, of the clock and of the processor, of three calls or three seconds each."
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {}
    for name, action in works().items():
        begin = time.perf_counter()
        action()
        times = []
        while not times or len(times) < 3 and time.perf_counter() - begin < 3:
            clock, processor = time.perf_counter(), time.process_time()
            action()
            times.append((time.perf_counter() - clock, time.process_time() - processor))
        found[name] = [statistics.median(side) * 1e3 for side in zip(*times)]
    print(json.dumps(found))


@report("threads", "five kinds of work with one and two threads, alone and beside a busy process")
def _():
    cases, rows = [(1, "spin"), (2, "spin"), (2, "sleep")], []
    for neighbour in (False, True):
        busy = (subprocess.Popen([sys.executable, "-c", "while True: pass"]) if neighbour else None)
        try:
            for threads, waiting in cases:
                environ = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
                done = subprocess.run(
                    [sys.executable, "-c", "import bench_threads; bench_threads.time_them()"],
                    cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                    env=environ | WAITING[waiting] | {"OMP_NUM_THREADS": str(threads)})
                for work, (clock, processor) in json.loads(done.stdout.splitlines()[-1]).items():
                    rows.append({"work": work, "threads": threads, "waiting": waiting, "neighbour":
                                 neighbour, "clock_ms": clock, "processor_ms": processor,
                                 "load": os.getloadavg()[0]})
        finally:
            if busy: busy.kill(); busy.wait()
    return rows
