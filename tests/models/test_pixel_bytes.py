"""A batch that carries bytes of pixels is learned as one that carries the image processor's floats."""

import pytest
import torch

from vlmtune.data import Collator, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'llava', 'internvl'])
def test_the_loss_is_that_of_floats(name, case, tiny_data):
    """Relative 1e-6: one multiply-add for the image processor's two steps."""
    family = case(name)
    data = tiny_data('llava', rows=4)
    dataset = SupervisedDataset(
        load_rows(data.data_path),
        processor=family.processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(data.image_folder),
    )
    collate = Collator(family.processor.family, pad_token_id=0, pack=True)
    batch = collate([dataset[i] for i in range(4)])
    assert batch['pixel_bytes'].dtype == torch.uint8
    assert 'pixel_values' not in batch
    model = family.build().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), model(**family.batch()), rtol=1e-6, atol=0)
