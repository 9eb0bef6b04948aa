#!/usr/bin/env bash
# What the findings are measured with: a language model, and beside it the two bundled models whose
# truth is known. `make findings` calls it with the store; what that holds is not measured again.
set -euo pipefail
cd "$(dirname "$0")/../.."
store=$1
real="--model smollm2-135m-instruct"
toys="--model organism-qwen2 --model organism-gemma2"
run() { .venv/bin/persona-nns run "$@" --store "$store"; }

# Where do persona and task add up? 30 layers; 8 in the toys.
run localized_positions $real --grid short --layers all --positions p_user_last,p_last,g1,g2
run localized_positions $real --grid long --layers 4,8,12,16,21,26 --positions p_last,g1,g2
run localized_positions $toys --grid short --layers all --positions p_user_last,p_last,g1,g2
run localized_positions $toys --grid long --layers all --positions p_last,g1,g2

# And with the persona in a system prompt, behind another exchange, or in another language?
for asked in "short --frame system" "short --frame later" short-fr short-de short-es short-zh; do
    run localized_positions $real --grid $asked
done

# Does the sum, or the residual itself, replace the persona's text? The paper's sets of layers, at
# the nearest depths.
run behavioral_markers $real
run behavioral_markers $toys
run host_injection $real --layer-sets \
    "16;12,14,16;12,14,16,18,21;12,14,16,18,21,23,25;7,9,12,14,16,18,21,23,25"
run host_injection $toys --layer-sets "4;3,4,5;2,3,4,5,6;0,1,2,3,4,5,6,7"
run injection_controls $real
run injection_controls $toys

# What carries the persona? Bands of layers in steps of three.
bands=all,0,3,6,9,12,15,18,21,24,27,0:3,0:6,0:9,0:12,0:15,0:18,0:21,0:24,0:27
bands=$bands,3:30,6:30,9:30,12:30,15:30,18:30,21:30,24:30,27:30
run kv_graft $real --bands "$bands"
run kv_graft $toys
run attention_knockout $real --bands "$bands"
run attention_knockout $toys

# And how few numbers? Heads, keys and values, and slots that are trained for it, which are kept in
# files of their own (8 MB, and 40 minutes of CPU time).
run head_budget $real
run kv_budget $real
run persona_cartridge $real --slots 4
run persona_cartridge $real --forms prefix --slots 8 --steps 30
# On the tasks that the slots were not trained on.
held_out=
for persona in engineer counselor founder teacher journalist doctor lawyer chef; do
    for task in policy haiku recommend; do held_out=$held_out,$persona/$task; done
done
run kv_budget $real --grid long --cells "${held_out#,}"

# Do persona words change what it gets right?
run persona_accuracy $real --questions mmlu-dev --identities docs/findings/identities.txt
run persona_patching $real --questions mmlu-dev --solved-by-baseline --n-questions 20 \
    --identities docs/findings/identities.txt --no-heads --layers 0,6,12,18,24,29

# A trait as a direction, without a judge: the model's own answers under two kinds of instruction.
for split in extraction evaluation; do
    run trait_responses $real --trait cheerful --split $split --judge none --max-new-tokens 48 \
        --name cheerful-$split
done
.venv/bin/python docs/findings/answers.py "$store" cheerful docs/findings/answers
run trait_vectors $real --responses docs/findings/answers/extraction/cheerful.jsonl --judge none
run trait_steering $real --vector "$store" --judge none --layers 4,8,12,16,20,24 --alphas 0,1,2,4 \
    --responses docs/findings/answers/evaluation/cheerful.jsonl

# Where do roles lie? Their answers are not kept with the findings: 9 MB of residuals.
if ! .venv/bin/persona-nns show "$store" persona_space > /dev/null 2>&1; then
    .venv/bin/persona-nns run persona_responses $real --roles bundled --n-instructions 1 \
        --n-questions 5 --max-new-tokens 40 --store "$store-answers"
    run persona_space $real --responses "$store-answers" --judge none
fi
