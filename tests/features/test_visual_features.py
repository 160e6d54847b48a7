"""Faces in real photographs, and their vectors."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from feature_helpers import scene, write_clip
from safetensors.torch import load_file, save_file

from spikemo_model.data import DataError
from spikemo_model.features.visual import FaceEncoder, Pictures, faces, largest_face


def test_real_faces_are_found_where_they_are(photographs):
    found = 0
    for i, path in enumerate(photographs):
        left, top, side = 20 + 5 * i, 10 + 3 * i, 130
        box = largest_face(scene((path, left, top, side)))
        if box is not None:
            x, y, size = box
            overlap = max(0, min(x + size, left + side) - max(x, left)) * max(
                0, min(y + size, top + side) - max(y, top)
            )
            assert overlap / (side**2 + size**2 - overlap) > 0.3, path.name
            found += 1
    assert found >= len(photographs) - 1


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_size_of_the_picture_does_not_matter(photographs, scale):
    picture = scene((photographs[0], 100, 60, 130))
    expected = largest_face(picture)
    box = largest_face(cv2.resize(picture, None, fx=scale, fy=scale))
    assert np.array(box) / scale == pytest.approx(expected, abs=12)


def test_nothing_is_found_where_there_is_no_face():
    assert largest_face(scene()) is None
    assert largest_face(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)) is None


def test_the_largest_face_is_taken_or_that_of_the_half_asked_for(photographs, tmp_path):
    large, small = (photographs[0], 10, 40, 140), (photographs[5], 190, 70, 100)
    path = write_clip(tmp_path / "two.mp4", [scene(large, small)] * 5)
    of = {side: faces(Pictures(path, side=side)).float() for side in (None, "left", "right")}
    assert of[None].shape == (5, 224, 224, 3)
    for side, expected in ((None, large), ("left", large), ("right", small)):
        x, y, size = largest_face(scene(expected))
        crop = cv2.resize(scene(expected)[y : y + size, x : x + size], (224, 224), interpolation=cv2.INTER_AREA)
        pair = np.stack([of[side][2].numpy().ravel(), crop.ravel()])
        assert np.corrcoef(pair)[0, 1] > 0.9


def test_pictures_without_a_face_are_left_out(photographs, tmp_path):
    some = [scene(), scene((photographs[0], 90, 50, 140))] * 5
    assert len(faces(Pictures(write_clip(tmp_path / "some.mp4", some)))) == 5
    assert faces(Pictures(write_clip(tmp_path / "none.mp4", [scene()] * 5))).shape == (0, 224, 224, 3)
    with pytest.raises(DataError, match=r"there is no .*absent\.mp4"):
        faces(Pictures(tmp_path / "absent.mp4"))


def test_a_clips_vector_is_the_mean_over_its_faces_and_zeros_without_any(face_encoder):
    embed = FaceEncoder(face_encoder)
    batch = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8)
    x = embed(batch)
    assert x.shape == (12,)
    torch.testing.assert_close(x, torch.stack([embed(face[None]) for face in batch]).mean(0))
    assert torch.equal(embed(batch[:0]), torch.zeros(12))
    pixels = (batch.permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(x, embed.model(pixels).pooler_output.mean((0, 2, 3)))


def test_the_encoders_own_constants_of_pixels_are_used(face_encoder, tmp_path):
    folder = Path(shutil.copytree(face_encoder, tmp_path / "other"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    white = torch.full((1, 224, 224, 3), 255, dtype=torch.uint8)
    embed = FaceEncoder(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(embed(white), embed.model(torch.ones(1, 3, 224, 224)).pooler_output.flatten())
    assert not torch.allclose(embed(white), FaceEncoder(face_encoder)(white))


def test_an_encoder_that_cannot_be_loaded_says_what_to_download(face_encoder, text_encoder, tmp_path, monkeypatch):
    cure = r"Download config\.json and model\.safetensors of microsoft/resnet-101, or save a ResNet-101"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=rf"empty' cannot be loaded .*{cure}"):
        FaceEncoder(str(tmp_path / "empty"))
    with pytest.raises(OSError, match=rf"it lacks \d+ weights of a ResNet.*{cure}"):
        FaceEncoder(text_encoder)
    folder = Path(shutil.copytree(face_encoder, tmp_path / "part"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.stages.0.layers.0.layer.0.convolution.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=rf"it lacks 1 weights of a ResNet.*{cure}"):
        FaceEncoder(str(folder))
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(OSError, match=cure):
        FaceEncoder(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"'microsoft/resnet-101' cannot be loaded .*{cure}"):
        FaceEncoder()
