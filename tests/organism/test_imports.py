import subprocess
import sys

OFFLINE = ("role_prompts", "multiple_choice", "traits", "trait_prompts", "trait_questions")
OFFLINE += ("coherence", "corpus", "wordings")


def test_the_grammar_needs_no_torch():
    imports = "; ".join(f"import persona_nns.organism.{name}" for name in OFFLINE)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
