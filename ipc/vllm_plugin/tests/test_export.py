import contextlib
import copy
import io
import os
import sys
import tempfile
import types
import unittest
import unittest.mock
from pathlib import Path

import torch

import apollod
from apollod.errors import ExportError
from apollod.manifest import validate
from apollod.memory import SharedMemory
from apollod.vllm_worker import keep_weights_live, refuse_transformed, unpacked
from client import Client, Mapped


class Tied(torch.nn.Module):
    """An embedding that is the head too, a layer in between, a buffer and an attribute that are views of it."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(13, 6, dtype=dtype)
        self.layer = torch.nn.Linear(6, 6, dtype=dtype)
        self.head = torch.nn.Linear(6, 13, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("first_rows", self.layer.weight.data[:2])
        self.transposed = self.layer.weight.data.t()
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


def export(model, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        return apollod.export(model, **options)


class Exported(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.socket = self.folder / "weights.sock"

    def export(self, model, **options):
        handle = export(model, socket=self.socket, model_dir=self.folder, **options)
        self.addCleanup(handle.close)
        return handle

    def manifest(self, handle):
        client = Client(handle.socket)
        self.addCleanup(client.close)
        return client.ask({"hello": 1})


class PackedExperts(unittest.TestCase):
    """vLLM's kernels keep the names and often the shapes of what they pack."""

    def model(self, backend):
        experts = torch.nn.Module()
        experts.w13_weight = torch.nn.Parameter(torch.zeros(2, 8, 4))
        if backend:
            method = type("UnquantizedFusedMoEMethod", (), {"unquantized_backend": types.SimpleNamespace(name=backend)})
            experts.quant_method = method()
        model = torch.nn.Module()
        model.experts = experts
        config = types.SimpleNamespace(
            model_config=types.SimpleNamespace(quantization=None),
            compilation_config=types.SimpleNamespace(inductor_compile_config={}),
        )
        return model, config

    def test_what_a_kernel_has_packed_is_refused_with_what_to_do(self):
        for backend, advice in [("CPU", "apollod.export"), ("FLASHINFER_CUTLASS", "--moe-backend triton"), (None, "unknown")]:
            with self.assertRaisesRegex(ExportError, f"`experts` .*{advice}"):
                refuse_transformed(*self.model(backend))

    def test_what_is_as_the_files_have_it_is_not(self):
        refuse_transformed(*self.model("TRITON"))


class Convolutions(unittest.TestCase):
    """Where vLLM has kernels for them, it says that the weight is packed."""

    def test_a_convolution_is_told_that_its_weight_is_as_the_model_has_it(self):
        weight, told = torch.arange(12.0).reshape(3, 1, 4), {}
        unpacked(lambda **given: told.update(given))(x="x", weight=weight, is_weight_packed=True)
        self.assertEqual((told["x"], told["is_weight_packed"], told["weight"].shape), ("x", False, (3, 4)))
        self.assertEqual(told["weight"].data_ptr(), weight.data_ptr(), "a copy would not be trained")

    def test_a_vllm_with_other_convolutions_gets_what_it_wants_and_goes_on(self):
        packed, layer = [], torch.nn.Conv1d(3, 3, 4, groups=3)
        folder = "vllm.model_executor.layers.mamba.ops.cpu"
        with unittest.mock.patch.dict(sys.modules, {folder: types.ModuleType(folder)}):
            keep_weights_live(lambda layer, remove_weight: packed.append(layer))(layer, True)
        self.assertEqual(packed, [layer])


class Memory(Exported):
    def test_moving_the_parameters_changes_no_value(self):
        model = Tied()
        ids = torch.arange(13)
        before, state = model(ids), copy.deepcopy(model.state_dict())
        self.export(model)
        self.assertTrue(torch.equal(model(ids), before))
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, state[name]), name)

    def test_a_write_through_another_mapping_is_what_the_model_computes_with(self):
        model = Tied()
        mapped = Mapped(self.manifest(self.export(model)))
        ids = torch.arange(13)
        for name in ("embed.weight", "layer.weight", "layer.bias", "head.weight"):
            before = model(ids)
            mapped[name].mul_(-2)
            self.assertTrue(torch.equal(mapped[name], dict(model.named_parameters(remove_duplicate=False))[name]))
            self.assertFalse(torch.equal(model(ids), before), name)

    def test_tied_tensors_and_views_stay_one(self):
        model = Tied()
        manifest = self.manifest(self.export(model))
        places = {entry["name"]: entry["offset"] for entry in manifest["tensors"]}
        self.assertEqual(set(places), {"embed.weight", "layer.weight", "layer.bias", "head.weight"})
        self.assertEqual(places["embed.weight"], places["head.weight"])
        Mapped(manifest)["layer.weight"].fill_(3)
        self.assertTrue((model.first_rows == 3).all())
        self.assertTrue((model.transposed == 3).all())
        self.assertEqual(model.count.item(), 3)

    def test_slices_of_one_storage_are_tensors_of_their_own_at_aligned_places(self):
        flat = torch.arange(31, dtype=torch.float32)
        model = torch.nn.Module()
        model.a = torch.nn.Parameter(flat[1:4])
        model.b = torch.nn.Parameter(flat[5:31:2])
        model.empty = torch.nn.Parameter(torch.empty(0))
        manifest = self.manifest(self.export(model))
        mapped = Mapped(manifest)
        self.assertEqual(mapped["a"].tolist(), [1, 2, 3])
        self.assertEqual(mapped["b"].tolist(), list(range(5, 31, 2)))
        self.assertTrue(all(entry["offset"] % 64 == 0 for entry in manifest["tensors"]))
        self.assertEqual([entry["strides"] for entry in manifest["tensors"]], [[1], [2], [1]])
        validate(manifest)

    def test_the_memory_cannot_be_resized(self):
        model = Tied()
        path = self.manifest(self.export(model))["allocations"][0]["path"]
        for size in (0, 1 << 20):
            with self.assertRaises(PermissionError):
                os.truncate(path, size)

    def test_parameters_that_lie_there_are_left_there(self):
        model = Tied()
        memory = SharedMemory(model)
        self.addCleanup(memory.close)
        self.assertTrue(memory.holds(model))
        model.layer.bias.data = model.layer.bias.data.clone()
        self.assertFalse(memory.holds(model))

    def test_the_model_outlives_its_export(self):
        model = Tied()
        handle = self.export(model)
        path = self.manifest(handle)["allocations"][0]["path"]
        before = model(torch.arange(13))
        handle.close()
        self.assertFalse(os.path.exists(path) and "apollod" in os.readlink(path))
        self.assertTrue(torch.equal(model(torch.arange(13)), before))
        before.sum().backward()


class Replaced(Exported):
    REFUSAL = {"error": "the model's parameters were replaced after it was exported; export it again"}

    def test_parameters_that_are_replaced_end_the_lease_and_are_not_lent(self):
        def assign(model):
            model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)

        def untie(model):
            model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())

        def new_layer(model):
            model.layer = torch.nn.Linear(6, 6, dtype=torch.bfloat16)

        for replace in (torch.nn.Module.float, assign, untie, new_layer):
            with self.subTest(replace.__name__):
                model = Tied()
                with export(model, socket=self.socket, model_dir=self.folder) as handle:
                    with Client(handle.socket) as client:
                        client.ask({"hello": 1})
                        self.assertEqual(client.ask({"ping": 1})["pong"], 1)
                        replace(model)
                        self.assertIsNone(client.ask({"ping": 2}))
                    with Client(handle.socket) as client:
                        self.assertEqual(client.ask({"hello": 1}), self.REFUSAL)
                with export(model, socket=self.socket, model_dir=self.folder) as handle:
                    self.assertIn("epoch", self.manifest(handle))

    def test_values_that_are_loaded_in_place_keep_the_lease(self):
        model = Tied()
        client = Client(self.export(model).socket)
        self.addCleanup(client.close)
        client.ask({"hello": 1})
        model.load_state_dict(Tied().state_dict())
        self.assertEqual(client.ask({"ping": 1})["pong"], 1)

    def test_what_is_exported_already_is_refused_and_stays_where_it_is(self):
        model = Tied()
        manifest = self.manifest(self.export(model))
        for part in (model, model.layer):
            with self.assertRaisesRegex(ExportError, f"already exported on {self.socket}; close that first"):
                export(part, socket=self.folder / "second.sock", model_dir=self.folder)
        self.assertFalse((self.folder / "second.sock").exists())
        Mapped(manifest)["layer.weight"].fill_(3)
        self.assertTrue((model.layer.weight == 3).all())


class Manifest(Exported):
    def test_it_says_what_a_trainer_needs(self):
        model = Tied()
        manifest = self.manifest(self.export(model))
        validate(manifest)
        self.assertEqual(manifest["version"], 1)
        self.assertRegex(manifest["epoch"], "^[0-9a-f]{32}$")
        self.assertEqual(manifest["pid"], os.getpid())
        self.assertEqual(manifest["model_dir"], str(self.folder))
        self.assertEqual((manifest["rank"], manifest["world_size"]), (0, 1))
        self.assertEqual(manifest["controls"], [])
        layer = next(entry for entry in manifest["tensors"] if entry["name"] == "layer.weight")
        self.assertEqual((layer["dtype"], layer["shape"], layer["strides"]), ("bfloat16", [6, 6], [6, 1]))

    def test_every_export_is_another_epoch(self):
        model = Tied()
        epochs = set()
        for _ in range(3):
            with export(model, socket=self.socket, model_dir=self.folder) as handle, Client(handle.socket) as client:
                epochs.add(client.ask({"hello": 1})["epoch"])
        self.assertEqual(len(epochs), 3)

    def test_a_wrong_one_is_refused(self):
        good = self.manifest(self.export(Tied()))
        for word, change in {
            "does not lie": lambda m: m["tensors"][0].update(offset=m["allocations"][0]["bytes"]),
            "multiple of 2": lambda m: m["tensors"][0].update(offset=1),
            "listed twice": lambda m: m["tensors"].append(m["tensors"][0]),
            "not listed": lambda m: m["tensors"][0].update(allocation=1),
            "dtype `int8`": lambda m: m["tensors"][0].update(dtype="int8"),
            "strides": lambda m: m["tensors"][0].update(strides=[1]),
            "0 bytes": lambda m: m["allocations"][0].update(bytes=0),
        }.items():
            bad = copy.deepcopy(good)
            change(bad)
            with self.subTest(word), self.assertRaisesRegex(ExportError, word):
                validate(bad)

    def test_the_name_of_what_cannot_be_trained_is_in_the_refusal(self):
        class Wrapper(torch.Tensor):
            @staticmethod
            def __new__(cls):
                return torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32)

            @classmethod
            def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
                return cls()  # Nothing but detach is asked of it.

        parameter = torch.nn.Parameter
        for word, bad in {
            "torch.int8": parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False),
            "float8": parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False),
            "float64": parameter(torch.zeros(2, dtype=torch.float64)),
            "sparse": parameter(torch.eye(2).to_sparse()),
            "meta": parameter(torch.zeros(2, device="meta")),
            "expanded": parameter(torch.zeros(1).expand(4)),
            "not initialized": torch.nn.parameter.UninitializedParameter(),
            "a Wrapper": parameter(Wrapper(), requires_grad=False),
        }.items():
            model = Tied()
            before = model.embed.weight.data_ptr()
            model.layer.register_parameter("odd", bad)
            with self.subTest(word), self.assertRaisesRegex(ExportError, f"`layer.odd` .*{word}"):
                self.export(model)
            self.assertEqual(model.embed.weight.data_ptr(), before)
            self.assertFalse(self.socket.exists())

    def test_a_model_without_a_directory_is_refused(self):
        with self.assertRaisesRegex(ExportError, "model_dir="):
            export(Tied(), socket=self.socket)
        with self.assertRaisesRegex(ExportError, "org/name is not a directory"):
            export(Tied(), socket=self.socket, model_dir="org/name")

    def test_the_socket_is_said_at_start(self):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), apollod.export(Tied(), self.socket, self.folder):
            pass
        self.assertEqual(said.getvalue(), f"apollod: weights are offered on {self.socket}\n")


class Score(Exported):
    def test_a_transformers_model_scores_by_its_own_forward_pass(self):
        class Config:
            _name_or_path = str(self.folder)

        class Output:
            pass

        class Causal(Tied):
            config = Config()

            def forward(self, input_ids):
                output = Output()
                output.logits = super().forward(input_ids)
                return output

        model = Causal()
        handle = export(model, socket=self.socket)
        self.addCleanup(handle.close)
        with Client(handle.socket) as client:
            self.assertEqual(client.ask({"hello": 1})["controls"], ["score"])
            (first, second) = client.ask({"score": [5, 12, 3]})["logprobs"]
            want = model(torch.tensor([[5, 12, 3]])).logits[0].float().log_softmax(-1)
            self.assertAlmostEqual(first, want[0, 12].item(), places=6)
            self.assertAlmostEqual(second, want[1, 3].item(), places=6)
            self.assertEqual(client.ask({"score": [5]}), {"logprobs": []})
            self.assertIn("index out of range", client.ask({"score": [5, 13]})["error"])
            self.assertEqual(client.ask({"ping": 1})["pong"], 1)


if __name__ == "__main__":
    unittest.main()
