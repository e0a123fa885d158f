import Foundation
import Testing

@testable import Phi3Core

@Suite struct CheckpointTests {
    /// As `mlx_medphi.model.fingerprint` gives them.
    private static let fingerprints = [
        ("gqa", "56bc7eb3ecadfda17ec22d6bb738c9a302c5caaf0c2aa752e3be2c005fab0e17"),
        ("longrope-long", "b0a882d049d01b4328c96bbfeb942f68d122e03a21e87213ec4f7790900ce1b6"),
        ("longrope-new-config", "699cdb580f738906f85760c2cc4ec18c99398c5fa24a852e7050e6f9d83a2327"),
        ("longrope-short", "906a104f8ecbf585e14edbee387165aa31724de1a61ed3f4ac7984b3fccc411a"),
        ("mini-4k", "17d4c82691c59bbbfadc8b2216a4659331c471ce8f27ea1ae645dc512504faed"),
        ("partial-rotary-tied", "4061e3342f0ec673cf9b1ee7f1d078e0b181f0ba81d304ef7705e5e229a56206"),
        ("sliding-window", "578c253b60581e0dc46aa0dc2e58df5a8268de3f5953e6f850a9647919092a83"),
    ]

    /// A copy of a small checkpoint, to be spoiled.
    private func copy() throws -> TestFolder {
        let folder = try TestFolder()
        for name in ["config.json", "model.safetensors"] {
            try FileManager.default.copyItem(
                at: FileFixtures.mini.appendingPathComponent(name), to: folder[name])
        }
        return folder
    }

    @Test(arguments: fingerprints)
    func fingerprintsEqualPythons(name: String, text: String) throws {
        let checkpoint = try Checkpoint.open(FileFixtures.phi3.appendingPathComponent(name))
        #expect(Fingerprint(of: checkpoint).text == text)
    }

    @Test func largeTensorsAreSampledAsPythonSamplesThem() throws {
        // The demo's embedding is beyond 64 KiB; the value is Python's.
        let tiny = FileFixtures.root.appendingPathComponent("mlx_medphi/assets/tiny")
        let print = Fingerprint(of: try Checkpoint.open(tiny))
        #expect(print.text == "b1913c2ac90d47397ccfd08ee56ddf6b0e5a1747090f4466e4cf2254704d7421")
    }

    @Test func quantisationOnLoadingIsReadFromTheSuffix() {
        let hash = String(repeating: "a1", count: 32)
        let base = Fingerprint(hash)
        #expect(Fingerprint("\(hash)-q4g64").quantized(from: base) == .init(bits: 4, groupSize: 64))
        for bad in [
            "", "-q4", "-q4g", "-qg64", "-q123g64", "-q4g12345", "-q4g64x", "x-q4g64", "-q+4g64",
        ] {
            #expect(Fingerprint(hash + bad).quantized(from: base) == nil, "\(bad)")
        }
        #expect(base.isPossible && Fingerprint("\(hash)-q8g32").isPossible)
        #expect(!Fingerprint("\(hash)0").isPossible && !Fingerprint("").isPossible)
        #expect(Fingerprint("\(hash)-q4g64").short == "a1a1a1a1a1a1a1a1…-q4g64")
    }

    @Test func shardsAreReadAsOneModel() throws {
        let whole = try Checkpoint.open(FileFixtures.mini)
        let folder = try copy()
        try FileManager.default.removeItem(at: folder["model.safetensors"])
        var map = JSONObject()
        for (part, tensors) in whole.storedTensors().chunked(into: 5).enumerated() {
            let name = "model-\(part).safetensors"
            try SafetensorsWriter.write(
                to: folder[name], pieces: tensors.map { TensorPiece(name: $0.name, $0.tensor) },
                metadata: [])
            for tensor in tensors { map[tensor.name] = .string(name) }
        }
        let index: JSONValue = ["weight_map": .object(map)]
        try folder.write(index.text(), "model.safetensors.index.json")
        let sharded = try Checkpoint.open(folder.url)
        #expect(Fingerprint(of: sharded) == Fingerprint(of: whole))
        #expect(sharded.byteCount == whole.byteCount)
        map["none"] = "model-0.safetensors"
        for bad: JSONValue in [
            .object(map), ["a": "../x.safetensors"], ["a": 1.json], .null, .object([:]),
        ] {
            try folder.write(
                (["weight_map": bad] as JSONValue).text(), "model.safetensors.index.json")
            #expect(throws: Phi3Error.self) { try Checkpoint.open(folder.url) }
        }
    }

    @Test func weightsThatDoNotFitTheConfigAreNamed() throws {
        let folder = try copy()
        let text = try String(contentsOf: folder["config.json"], encoding: .utf8)
        for (key, value) in [
            ("num_hidden_layers", 3), ("num_hidden_layers", 9999), ("vocab_size", 321),
            ("intermediate_size", 95),
        ] {
            var members = try #require(JSONValue(parsing: text).object)
            members[key] = value.json
            try folder.write(JSONValue.object(members).text(), "config.json")
            #expect(throws: Phi3Error.self, "\(key)") { try Checkpoint.open(folder.url) }
        }
        try folder.write("{}", "config.json")
        #expect(throws: Phi3Error.self) { try Checkpoint.open(folder.url) }
        try folder.write(text, "config.json")
        _ = try Checkpoint.open(folder.url)
    }

    @Test func whatIsNoModelIsRefused() throws {
        let folder = try TestFolder()
        #expect(throws: Phi3Error.self) { try Checkpoint.open(folder.url) }
        #expect(throws: Phi3Error.self) { try Checkpoint.open(folder["none"]) }
        #expect(throws: Phi3Error.self) { try Checkpoint.open(folder.write("", "x.gguf")) }
        #expect(throws: Phi3Error.self) {
            try Checkpoint.open(FileFixtures.mini.appendingPathComponent("peft_0"))
        }
        let plain = FileFixtures.mini.appendingPathComponent("model.safetensors")
        #expect(throws: Phi3Error.self) { try Checkpoint.open(plain) }
    }

    @Test func aCutWeightFileIsRefusedAndNothingElseHappens() throws {
        let folder = try copy()
        let data = try Data(contentsOf: folder["model.safetensors"])
        var generator = SplitMix(21)
        for _ in 0..<FileFixtures.fuzzCount(40) {
            let end = Int.random(in: 0..<data.count, using: &generator)
            try folder.write(data.prefix(end), "model.safetensors")
            #expect(throws: Phi3Error.self) { try Checkpoint.open(folder.url) }
        }
    }

    /// sin 0 … sin 63 in groups of 32 as `mx.quantize` packs them.
    private static let packed: [(bits: Int, words: [UInt32])] = [
        (2, [0xfd1f_d0be, 0x47f8_2f81, 0x82f9_1fd1, 0xbf47_f47f]),
        (3, [0xb7ec_1bfc, 0xfa43_ff20, 0x40df_d833, 0xe90f_fc82, 0x037f_80cf, 0x7fd2_16f9]),
        (
            4,
            [
                0xd602_9ff8, 0xdfb4_04bf, 0x18ff_9206, 0x503a_fe71, 0x06df_b404, 0x7118_ff92,
                0xfc50_3afe, 0x7efa_305c,
            ]
        ),
        (
            5,
            [
                0x0249_7fb0, 0x701e_ffdb, 0x102b_d7ee, 0xc214_3bf9, 0x500b_4ff1, 0xf5fb_a007,
                0x0efe_640a, 0xd3fc_7085,
                0x38fe_5402, 0x6f3f_5301,
            ]
        ),
        (
            6,
            [
                0x4897_dee0, 0xfb7f_d570, 0xd7fb_4f00, 0xfd94_8057, 0x8703_160e, 0x4c02_e9ff,
                0x7fb8_f00e, 0xd948_057d,
                0x7031_5fef, 0xc02e_8ff9, 0x04b1_ff24, 0x6f8f_ea30,
            ]
        ),
        (
            8,
            [
                0x92f4_ec80, 0xd45c_051f, 0x003a_b5ff, 0xd3ff_b63b, 0x9320_055b, 0x147f_ebf5,
                0xfae2_6f0c, 0x4c02_2ba3,
                0xb73c_0039, 0x055a_d2ff, 0xeaf5_9421, 0x700d_137e, 0x2aa2_fae2, 0xffc8_4d02,
                0x2e01_48c3, 0x6bdf_fca7,
            ]
        ),
    ]

    @Test(arguments: packed.indices)
    func quantisedWeightsAreUnpackedAsMLXDoes(index: Int) throws {
        let (bits, words) = Self.packed[index]
        let folder = try TestFolder()
        let scales = Self.scales[index]
        let codes = words.withUnsafeBytes { Data($0) }
        let config: JSONValue = [
            "model_type": "phi3", "vocab_size": 1.json, "hidden_size": 64.json,
            "intermediate_size": 1.json,
            "num_hidden_layers": 1.json, "num_attention_heads": 1.json,
            "max_position_embeddings": 8.json,
            "quantization": ["bits": bits.json, "group_size": 32.json],
        ]
        try folder.write(config.text(), "config.json")
        let shapes = try ModelConfig.fromHF(config).expectedTensors([
            "model.embed_tokens.weight": TensorInfo(
                type: .u32, shape: [1, words.count], range: 0..<codes.count)
        ])
        let pieces = shapes.sorted { $0.key < $1.key }.map { name, form -> TensorPiece in
            let count = form.shape.reduce(1, *)
            switch name {
            case "model.embed_tokens.weight":
                return TensorPiece(name: name, Tensor(type: .u32, shape: form.shape, data: codes))
            case "model.embed_tokens.scales":
                return TensorPiece(name: name, Tensor(scales, shape: [1, 2]))
            case "model.embed_tokens.biases":
                return TensorPiece(
                    name: name, Tensor([-0.9999902248382568, 0.9999118447303772], shape: [1, 2]))
            default:
                return TensorPiece(
                    name: name, Tensor([Float](repeating: 0, count: count), shape: form.shape))
            }
        }
        try SafetensorsWriter.write(to: folder["model.safetensors"], pieces: pieces, metadata: [])
        let matrix = try #require(
            WeightMatrix(try Checkpoint.open(folder.url), layer: "model.embed_tokens"))
        #expect(matrix.columns == 64 && matrix.rows == 1)
        for (column, value) in matrix.row(0).enumerated() {
            // MLX keeps zero exact, so that one end of a group may be cut by as much as a step.
            #expect(
                abs(value - sin(Float(column))) <= abs(scales[column / 32]) + 1e-4,
                "\(bits) bits, \(column)")
        }
    }

    private static let scales: [[Float]] = [
        [0.4999951124191284, -0.4999559223651886], [0.2499975562095642, -0.2499779611825943],
        [0.1249987781047821, -0.12498898059129715], [0.06249938905239105, -0.062494490295648575],
        [0.031249694526195526, -0.031247245147824287],
        [0.0078124236315488815, -0.007811811286956072],
    ]
}

extension Array {
    /// The items in pieces of some size.
    func chunked(into size: Int) -> [[Element]] {
        stride(from: 0, to: count, by: size).map { Array(self[$0..<Swift.min($0 + size, count)]) }
    }
}
