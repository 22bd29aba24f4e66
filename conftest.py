"One pytest command for the chapters (nbs/*.ipynb, as nbdev_test runs them) and for tests/."
import gc, importlib, os, pytest
from pathlib import Path

def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="nbdev flags of cells to run too, e.g. 'cuda slow'")
    parser.addoption("--slow", action="store_true", help="run the long tests as well")

def pytest_configure(config): config.addinivalue_line("markers", "slow: long test, runs with --slow")

def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="long: run with --slow"))

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent.name == "nbs": return Chapter.from_parent(parent, path=file_path)

class Chapter(pytest.File):
    def collect(self): yield ChapterItem.from_parent(self, name=self.path.stem)

def package_classes() -> dict: # class -> its attributes
    "What the package's classes are, before a chapter patches its own methods into them"
    names = sorted(f.stem for f in (Path(__file__).parent/'nano_dh').glob('[!_]*.py'))
    mods = [importlib.import_module(f'nano_dh.{n}') for n in names]
    return {c: dict(vars(c)) for m in mods for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__}

def restore(classes:dict):
    for c, was in classes.items():
        for k in [k for k in vars(c) if k not in was]: delattr(c, k)
        for k, v in was.items():
            if vars(c).get(k) is not v: setattr(c, k, v)

class ChapterItem(pytest.Item):
    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        cfg, cwd, classes = get_config(), os.getcwd(), package_classes()
        os.chdir(self.path.parent)
        try:
            ok, _ = test_nb(self.path, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path,
                            force_flags=self.config.getoption("flags").split())
        finally: os.chdir(cwd); restore(classes); gc.collect(); gc.freeze()   # the next chapter looks at its own objects alone
        if not ok: pytest.fail(f"{self.path.name}: the failing cell's traceback is in captured stderr", pytrace=False)
    def reportinfo(self): return self.path, 0, self.path.name
