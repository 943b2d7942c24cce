import pytest
import torch
from torch import nn

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.objective.catalogue import DTYPES, FrozenCatalogue, embedder_hash
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData

CONFIG = TrainConfig(params=2000, embedder_share=0.1, d_item=8)
NAME = "catalogue.safetensors"


@pytest.fixture
def model(toy_shards):
    return TrainingData.of(toy_shards).build_model(CONFIG, 0)


def load(store, model, fields_hash="fields", rows=0, **options):
    shape = model.item_store.num_items + rows, model.shape.d_item
    return FrozenCatalogue.load(store, NAME, embedder_hash(model, fields_hash), shape, **options)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_is_saved_is_loaded(model, tmp_path, dtype):
    made = FrozenCatalogue.embed(model, "fields", dtype)
    assert not isinstance(made.vectors_ID, nn.Parameter)
    assert not made.vectors_ID.requires_grad
    assert made.vectors_ID.dtype == dtype
    torch.testing.assert_close(made.vectors_ID, model.embed_all().to(dtype), rtol=0, atol=0)
    made.save(Store(tmp_path), NAME)
    got = load(Store(tmp_path), model)
    assert torch.equal(got.vectors_ID, made.vectors_ID)
    assert got.key == made.key
    got.verify(model)


def test_another_model_or_other_fields_are_refused(model, toy_shards, tmp_path):
    store = Store(tmp_path)
    FrozenCatalogue.embed(model, "fields").save(store, NAME)
    for other, fields in ((model, "others"), (TrainingData.of(toy_shards).build_model(CONFIG, 1), "fields")):
        with pytest.raises(UserError, match="another model"):
            load(store, other, fields)
    # What is not the embedder's may go on learning: the catalogue stays that of the model.
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name not in model.embedder_parameter_names():
                values += 1
    load(store, model).verify(model)
    with pytest.raises(UserError, match="no catalogue"):
        FrozenCatalogue.load(store, "none", "key", (1, 1))


def test_every_damage_is_refused(model, tmp_path):
    store = Store(tmp_path)
    FrozenCatalogue.embed(model, "fields").save(store, NAME)
    data = store.get(NAME)
    # In the header any change may also read as another key, version or type; it is never accepted.
    for place in range(0, len(data), 97):
        store.put(NAME, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((CorruptError, UserError)):
            load(store, model)
    for length in (0, 5, 100, len(data) - 1):
        store.put(NAME, data[:length])
        with pytest.raises(CorruptError, match="truncated"):
            load(store, model)
    store.put(NAME, data)
    with pytest.raises(CorruptError, match="holds"):
        load(store, model, rows=1)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_verify_finds_vectors_that_are_not_the_models(model, dtype):
    catalogue = FrozenCatalogue.embed(model, "fields", dtype)
    catalogue.verify(model)
    for wrong in (0.05, float("nan")):
        vectors = catalogue.vectors_ID.clone()
        vectors[3, 2] += wrong
        with pytest.raises(CorruptError, match="not what the model computes"):
            FrozenCatalogue(vectors, catalogue.key).verify(model)
    with pytest.raises(CorruptError, match="items"):
        FrozenCatalogue(catalogue.vectors_ID[:-1], catalogue.key).verify(model)
