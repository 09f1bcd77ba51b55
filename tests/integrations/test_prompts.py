import pytest
import torch

from kvtier.errors import ConfigError
from kvtier.integrations.prompts import joined, without_padding

IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0], [1, 2, 3, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])


def test_rows_are_cut_to_what_the_mask_marks():
    assert [row.tolist() for row in without_padding(IDS, MASK)] == [[5, 6], [7, 8, 9], [1, 2, 3, 4]]


def test_without_a_mask_every_token_counts():
    assert [row.tolist() for row in without_padding(IDS, None)] == IDS.tolist()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]), r"attention_mask\[0\]: has a hole"),
        (IDS, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), r"attention_mask\[1\]: marks no token"),
        (IDS, MASK[:, :3], r"attention_mask: shape \[3, 3\]"),
        (IDS[0], None, r"input_ids: shape \[4\]"),
        (IDS[:, :0], None, r"input_ids: shape \[3, 0\]"),
        (IDS.to("meta"), None, "input_ids: is on the meta device"),
        (IDS, MASK.to("meta"), "attention_mask: is on the meta device"),
    ],
)
def test_what_is_no_batch_of_prompts_is_refused(ids, mask, message):
    with pytest.raises(ConfigError, match=message):
        without_padding(ids, mask)


def test_new_tokens_follow_their_prompts_and_are_padded_to_one_length():
    new = [torch.tensor([[11, 12], [13, 14]]), torch.tensor([[15]])]
    assert joined(IDS[:2], new, 99).tolist() == [
        [0, 0, 5, 6, 11, 12],
        [0, 0, 5, 6, 13, 14],
        [7, 8, 9, 0, 15, 99],
    ]
