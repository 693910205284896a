"""The head of a bundled train_gpt.py: serves pgolf and pgolf_kernels from a dictionary of sources in that file.

It stands above every other import of the bundle, so it may import nothing of ours. A module that was left out is still
importable, for others import it at their top: its names are stand-ins, which refuse when they are called.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

OURS = ("pgolf", "pgolf_kernels")


class Program(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules of a bundle.

    Args:
        file: the bundle's own.
        sources: text by full name of the module, or by path below pgolf_kernels for its data files.
        packages: names among sources.
        left_out: full names of modules that are not here.
        build: a Builder of bundle_build.py: full name of an extension module -> path of its library; None: there are
            none.
    """

    def __init__(self, file, sources, packages, left_out, build=None):
        self.file, self.sources, self.packages = str(Path(file).resolve()), sources, packages
        self.left_out, self.build = left_out, build
        self.program_bytes = Path(file).stat().st_size  # read by artifact/pack.py: what counts beside the artifact
        sys.meta_path.insert(0, self)  # before every other pgolf

    def find_spec(self, name, path=None, target=None):
        if name in self.sources or name in self.left_out:
            spec = importlib.util.spec_from_loader(name, self, is_package=name in self.packages)
            spec.origin = self.get_filename(name)
            spec.has_location = True
            return spec
        if name in ("pgolf_kernels._cpu", "pgolf_kernels._cuda"):
            kind = name.rpartition("_")[2]
            if self.build is None or not self.build.ops[kind]:
                option = f"--kernels {'cpu' if kind == 'cpu' else 'gpu'}"
                raise ImportError(f"this program was bundled without it; `pgolf bundle RUN {option}` makes one with it")
            return importlib.util.spec_from_file_location(name, self.build(name))
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"{self.file} has no module {name}", name=name)
        return None

    def is_package(self, name):
        return name in self.packages

    def get_filename(self, name):
        return f"{self.file}/{name.replace('.', '/')}{'/__init__' if name in self.packages else ''}.py"

    def get_source(self, name):
        return self.sources.get(name)

    def get_data(self, path):
        """A data file of a package, for pkgutil.get_data."""
        return self.sources[path.removeprefix(f"{self.file}/")].encode()

    def exec_module(self, module):
        if module.__name__ in self.left_out:
            module.__getattr__ = lambda attribute: stand_in(module.__name__, attribute)
        else:
            code = compile(self.sources[module.__name__], module.__spec__.origin, "exec", dont_inherit=True)
            exec(code, module.__dict__)


class StandIn(type):
    """The type of what stands for a name of a module that was left out: a class, for isinstance and annotations."""

    def __call__(cls, *args, **kwargs):
        reason = f"this program was bundled without {cls.__module__}, which its run did not use"
        if "why_not" in cls.__name__:  # an implementation is asked whether it can run
            return reason
        from pgolf.errors import InputError

        raise InputError(f"{reason}; bundle a run that uses it")


def stand_in(module, attribute):
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return StandIn(attribute, (), {"__module__": module})


def start(program, config, parts, without_triton):
    """Run the bundle's command line. Returns its exit code."""
    from pgolf.config import Config
    from pgolf.script import main
    from pgolf_kernels import dispatch

    if without_triton:
        dispatch.TRITON_MISSING = "this program was bundled without Triton kernels, which its run did not use"
    return main(config=Config.from_json(config), parts=parts)
