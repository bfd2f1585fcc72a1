#!/usr/bin/env bash
# Makes quickstart/base from nothing but the package easy-vqa: about 30 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
work=${1:-work_dirs/quickstart_base}

python quickstart/prepare_data.py --base
python quickstart/init_base.py quickstart/data/untrained

# stage DIR MODEL [SETTING=VALUE ...]: train from quickstart/data/MODEL, convert to quickstart/data/DIR
stage() {
    local name=$1 model=$2
    shift 2
    vlmtune train quickstart_base --work-dir "$work/$name" \
        --cfg-options pretrained_model_name_or_path="quickstart/data/$model" "$@"
    rm -rf "quickstart/data/$name"
    vlmtune convert pth_to_hf quickstart_base "$work/$name/$(cat "$work/$name/last_checkpoint")" "quickstart/data/$name"
}

stage base_1 untrained
# The vision encoder sees now and stays as it is. Four questions to a picture, then one: an answer must not lean on others.
stage base_2 base_1 data_path=quickstart/data/base_2_questions.jsonl tune.vision_encoder=frozen lr=2e-3 max_epochs=3
stage base_3 base_2 data_path=quickstart/data/base_3_questions.jsonl tune.vision_encoder=frozen lr=2e-3 max_epochs=3 \
    batch_size=32
stage base_4 base_3 data_path=quickstart/data/base_4_reminders.jsonl tune.vision_encoder=frozen lr=1e-3 max_epochs=1 \
    batch_size=32

sha256sum quickstart/data/base_4/model.safetensors
python quickstart/evaluate.py quickstart/data/base_4 quickstart/data/questions_test.jsonl
echo 'then: rm -rf quickstart/base && cp -r quickstart/data/base_4 quickstart/base'
