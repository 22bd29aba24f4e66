"One pytest command for the chapters (nbs/*.ipynb, as nbdev_test runs them) and for tests/; with -n auto on every core."
import gc, importlib, os, pytest, sys, tempfile
from contextlib import ExitStack
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent/"tests"))      # outputs.py

# these assert that something happens within some seconds, or look at all processes of the machine: no other test runs meanwhile. What is compared
# with a time measured in the same moment, or is time of the processor, needs no room of its own
ALONE = ("nbs/65_serve_limits", "nbs/66_serve_load") + tuple("tests/test_" + t for t in """
    engine.py::test_long_streams sandbox.py::test_hostile sandbox.py::test_all_hostile
    serve.py::test_heavy_bodies serve.py::test_silent_connections serve.py::test_leaving serve.py::test_key_queue
    serve.py::test_two_hundred serve.py::test_kill_and_start_again web.py""".split())
LONG = tuple("""tests/test_serve tests/test_engine tests/test_papermill tests/test_train tests/test_launch tests/test_model nbs/71 tests/test_kernels
    tests/test_ranks_optim tests/test_data tests/test_seams nbs/79 tests/test_exchange nbs/26 nbs/13 tests/test_delta tests/test_loader nbs/60 tests/test_mechanisms nbs/68
    nbs/70 nbs/77 nbs/69 tests/test_rl nbs/05 tests/test_chat tests/test_eval nbs/09 nbs/78 nbs/43 nbs/67 nbs/52 nbs/41""".split())   # begin first, so that none ends alone
alone = lambda nodeid: nodeid.startswith(ALONE)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))    # 0: this process runs the tests itself, or hands them out
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)         # the many processes that tests start find the package compiled
if WORKERS: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES//WORKERS)))      # torch is not imported yet
else: PLACE = tempfile.TemporaryDirectory(prefix="tests-"); os.environ["NANO_DH_TESTS"] = PLACE.name

def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="nbdev flags of cells to run too, e.g. 'cuda slow'")
    parser.addoption("--slow", action="store_true", help="run the long tests as well")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long test, runs with --slow")
    config.option.loadscopereorder = False              # xdist would begin with the files of most tests

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config): # what `-n auto` means
    "A worker for each core and 3 GB; 8 at most, for files are handed out whole; no workers where tests would share a GPU"
    if any(Path("/dev").glob("nvidia[0-9]*")): return 0
    n = min(CORES, 8, int(os.sysconf("SC_PHYS_PAGES")*os.sysconf("SC_PAGE_SIZE")/3e9))
    return n if n > 1 else 0

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests go to one worker, because they share fixtures; those that want the machine alone go to one as well"
    from xdist.scheduler import LoadFileScheduling
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid): return "alone" if alone(nodeid) else super()._split_scope(nodeid)
    return Files(config, log)

room = ExitStack()      # what this worker holds: the room shared with the tests of others, or alone

def enter(by_itself:bool):
    "Nobody passes one who waits at the door, so who wants to be alone gets there"
    from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
    door, inside = (room.enter_context((Path(os.environ["NANO_DH_TESTS"])/f).open("w")) for f in ("door", "room"))
    flock(door, LOCK_EX); flock(inside, LOCK_EX if by_itself else LOCK_SH); flock(door, LOCK_UN)
    room.by_itself = by_itself

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if WORKERS and not getattr(room, "by_itself", False): enter(alone(item.nodeid))
    try: return (yield)
    finally:
        if not (nextitem and nextitem.path == item.path): gc.collect(); gc.freeze()      # the next file looks at its own objects alone
        if WORKERS and not (room.by_itself and nextitem and alone(nextitem.nodeid)): room.close(); room.by_itself = False

def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="long: run with --slow"))

def pytest_collection_finish(session): # what was imported is not looked through again and again
    gc.collect(); gc.freeze(); gc.set_threshold(20_000, 20, 20)

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent.name == "nbs": return Chapter.from_parent(parent, path=file_path)

class Chapter(pytest.File):
    def collect(self): yield ChapterItem.from_parent(self, name=self.path.stem)

def package_classes() -> dict: # class -> its attributes
    "What the package's classes are, before a chapter patches its own methods into them"
    names = sorted(f.stem for f in (Path(__file__).parent/'nano_dh').glob('[!_]*.py'))
    mods = [importlib.import_module(f'nano_dh.{n}') for n in names]
    return {c: dict(vars(c)) for m in mods for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__}

def package_functions() -> list: # (replaceable function, the version in place)
    "Which version of each replaceable function is in place, before a chapter puts in its own"
    from nano_dh.core import Replaceable
    mods = [m for name, m in [*sys.modules.items()] if name.startswith('nano_dh.')]
    return [(f, f.now) for m in mods for f in [*vars(m).values()] if isinstance(f, Replaceable)]

def restore(classes:dict, functions:list):
    for f, now in functions: f.now = now
    for c, was in classes.items():
        for k in [k for k in vars(c) if k not in was]: delattr(c, k)
        for k, v in was.items():
            if vars(c).get(k) is not v: setattr(c, k, v)

class ChapterItem(pytest.Item):
    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        from outputs import faults, recorded
        cfg, cwd, classes = get_config(), os.getcwd(), package_classes()
        functions = package_functions()
        os.chdir(self.path.parent)
        try:
            with recorded() as run:
                ok, _ = test_nb(self.path, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path,
                                force_flags=self.config.getoption("flags").split())
        finally: os.chdir(cwd); restore(classes, functions)
        if not ok: pytest.fail(f"{self.path.name}: the failing cell's traceback is in captured stderr", pytrace=False)
        if wrong := faults(self.path, run): pytest.fail('\n'.join(wrong), pytrace=False)
    def reportinfo(self): return self.path, 0, self.path.name
