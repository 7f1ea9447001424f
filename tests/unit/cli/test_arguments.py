"""Errors about the command line itself: clear, and without what was written on it."""

from __future__ import annotations

import sys

import pytest

from dist_ft.cli import main as cli_main

SECRET = "n0t-A-real-" + "s3cret_7f3a"


CONFIG = """
run: {name: x}
model: {path: ./m}
data: {train: a.jsonl}
batch: {global_batch: 4, sequence_length: 8}
schedule: {steps: 3}
"""


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs `main` here and returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dist-ft", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    monkeypatch.delenv("DIST_FT_DEBUG", raising=False)
    return call


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "c.yaml", "--storage.options.s3.secret=" + SECRET),
        ("train", "c.yaml", "--token", SECRET),
        ("train", "c.yaml", "--token=" + SECRET),
        ("train", "c.yaml", "--" + SECRET),
        ("train", "c.yaml", "-" + SECRET),
        ("train", "c.yaml", "--skip-check=" + SECRET),
        ("train", "storage.options.s3.secret=" + SECRET),
        ("train", "c.yaml", "storage.options.s3.secret=" + SECRET),
        ("check", "c.yaml", "secret: " + SECRET),
        ("jobs", "status", "name", SECRET),
        ("jobs", "status", "name", "--address", f"http://u:{SECRET}@h:8265"),
        ("jobs", "list", "--address", f"u:{SECRET}@h:8265"),
        ("jobs", "list", "--address", f"https://h/?token={SECRET}"),
        ("runs", "diff", "runs/x", "--step", SECRET, "--step", "2"),
        ("predict", "model", "rows", "--out", "x", "--workers", SECRET),
        ("preview", "c.yaml", "--samples", SECRET + "'\n\\x"),
        ("data", "inspect", f"https://u:{SECRET}@h/x.jsonl"),
        ("data", SECRET),
        (SECRET,),
        ("--api-key", SECRET, "train"),
        ("k8s", "render", "c.yaml", "--set", "password=" + SECRET),
        ("k8s", "render", "c.yaml", "--set", SECRET),
        ("k8s", "render", "c.yaml", "--image", f"https://u:{SECRET}@registry/x:1"),
        ("k8s", "render", "c.yaml", "--workers-per-node", SECRET),
        ("selftest", "storage.options.s3.secret=" + SECRET),
        ("selftest", "--check", "password=" + SECRET),
        ("drill", "storage.options.s3=" + SECRET),
        ("train", "c.yaml", "storage.options=secret=" + SECRET),
        ("train", "c.yaml", 'storage.options.s3.secret="' + SECRET),
        ("train", "c.yaml", "storage.options.s3.secret", SECRET),
        ("plan", "c.yaml", f"model.path=https://u:{SECRET}@h/m"),
        ("export", "runs/x", "--out", "o", "--step", SECRET),
    ],
    ids=lambda arguments: " ".join(arguments).replace(SECRET, "SECRET")[:60],
)
@pytest.mark.parametrize("debug", ["0", "1"])
def test_an_argument_that_is_refused_is_not_quoted(main, monkeypatch, tmp_path, arguments, debug):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.setenv("DIST_FT_DEBUG", debug)
    code, out, err = main(*arguments)
    assert code in (1, 2)
    for start in range(len(SECRET) - 6):
        assert SECRET[start : start + 7] not in out + err, err


def test_a_group_without_a_command_shows_its_help(main):
    assert "inspect" in "".join(main("data")[1:])


def test_misspelled_names_are_quoted(main):
    assert "trian" in main("trian", "c.yaml")[2]
    assert "--skip-chek" in main("train", "c.yaml", "--skip-chek")[2]


def test_a_bad_value_names_the_option(main):
    code, _, err = main("preview", "c.yaml", "--samples", "many")
    assert code == 2 and "--samples" in err and "valid integer" in err


def test_everything_that_is_printed_is_redacted(main, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)

    def show(*_arguments, **_options):
        print("out", SECRET)
        print("err", SECRET, file=sys.stderr)
        raise SystemExit(3)

    monkeypatch.setattr("dist_ft.config.load.load_config", show)
    assert main("train", "c.yaml") == (3, "out <MY_TOKEN>\n", "err <MY_TOKEN>\n")
