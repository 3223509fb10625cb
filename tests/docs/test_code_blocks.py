"""Every code block of the pages: Python runs, commands exist with their options, and what cannot run here says why."""

import doctest
import shlex
import subprocess

import pytest
import torch.distributed as dist
import typer

from docs.pages import NOT_RUN, PAGES, ROOT, blocks_of, inline_commands, tokens_of
from lowmem_optim.cli import app

LANGUAGES = ("bash", "python", "text", "json", "toml", "yaml")
# a reason is a sentence, not a word
LEAST_REASON = 10


def pages_with(language):
    return [page for page in PAGES if any(block.language == language for block in blocks_of(page))]


def parse_lowmem(words):
    """Read a command line as `lowmem` would, up to where the command would begin; raises as it would."""
    group = typer.main.get_command(app)
    with group.make_context("lowmem", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        with command.make_context(name, rest, parent=context):
            pass


def check_command(words, where):
    """Fail where a command is not one that can be checked, or is one that would not run."""
    program, *rest = words
    if program == "lowmem":
        try:
            parse_lowmem(rest)
        except typer.Exit:  # --help
            pass
        except Exception as error:
            pytest.fail(f"{where}: {' '.join(words)}: {error}")
    elif program == "make":
        run = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{where}: {run.stderr}"
        for line in run.stdout.splitlines():
            if line.startswith(".venv/bin/lowmem "):
                check_command(["lowmem", *shlex.split(line)[1:]], where)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"{where}: {rest[0]} does not exist"
    else:
        pytest.fail(
            f"{where}: {program} is not checked; allowed: lowmem, make, python, or a comment <!-- not run: ... -->"
        )


@pytest.fixture
def _one_process(monkeypatch):
    """The environment that torchrun gives the only process of a job, for init_process_group()."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", pages_with("python"))
@pytest.mark.usefixtures("_one_process")
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page, in their order and in one namespace, print what the text after them says."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        # empty lines before it, so that a traceback has the lines of the page
        code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
        if block.not_run is None:
            exec(code, namespace)
            printed = capsys.readouterr().out
            if block.output is not None:
                same = doctest.OutputChecker().check_output(block.output, printed, doctest.ELLIPSIS)
                assert same, f"{page}:{block.line} prints\n{printed}\nand says\n{block.output}"


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_exist(page):
    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for words in block.commands():
            if block.not_run is None or words[0] in ("lowmem", "make"):
                check_command(words, f"{page}:{block.line}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page):
    """They may be without arguments, or with N for a number, but subcommands, options and targets are real."""
    for words in inline_commands(page):
        if words[0] == "make":
            check_command(words, page)
        elif len(words) > 1:
            command = typer.main.get_command(app).commands.get(words[1])
            assert command is not None, f"{page}: lowmem {words[1]}"
            known = {name for param in command.params for name in param.opts + param.secondary_opts} | {"--help"}
            wrong = {word for word in words if word.startswith("--")} - known
            assert not wrong, f"{page}: lowmem {words[1]} has no {', '.join(wrong)}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    """A block without a language would be looked at by no test, and not be coloured on the site."""
    for block in blocks_of(page):
        allowed = ", ".join(LANGUAGES)
        assert block.language in LANGUAGES, f"{page}:{block.line}: language is {block.language!r}; allowed: {allowed}"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page):
    comments = [
        found for token in tokens_of(page) for found in NOT_RUN.findall(token.content) if token.type == "html_block"
    ]
    before_blocks = [block.not_run for block in blocks_of(page) if block.not_run is not None]
    assert [comment.strip() for comment in comments] == before_blocks, f"{page}: a comment 'not run' before no block"
    for reason in before_blocks:
        assert len(reason) >= LEAST_REASON, f"{page}: 'not run' without a reason: {reason!r}"
