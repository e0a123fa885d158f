import Foundation
import Phi3Core
import Testing

@testable import Phi3CoreML

/// Makes bundles for the test module from small checkpoints: a manifest as the exporter writes it, and
/// a package that holds the checkpoint.
struct BundleMaker {
    /// How adapters reach the model.
    enum Adapters {
        case none, fused
        case slots(Manifest.Adapters.SlotKind)
        case functions([String])
    }

    var checkpoint = Fixtures.mini
    var name = "mini"
    var context = 192
    var width = 64
    var rank = 16
    var adapters = Adapters.none

    private static let hash = SHA256.hex(Data("abc".utf8))
    private static let texts = ["chat_template.jinja", "tokenizer.json", "vectors.json"]
    private static let package = "model/Phi3.mlpackage"

    /// Writes the bundle into a folder.
    ///
    /// - Parameter change: spoils the manifest after the package was made.
    func make(
        in folder: TestFolder, change: (inout JSONObject) -> Void = { _ in }
    ) throws -> ModelBundle {
        let files = FileManager.default
        let url = folder["\(name)-\(UUID().uuidString.prefix(6)).medphi"]
        let data = url.appendingPathComponent("\(BundleMaker.package)/Data")
        let weights = data.appendingPathComponent("checkpoint")
        try files.createDirectory(at: weights, withIntermediateDirectories: true)
        for file in ["config.json", "model.safetensors"] {
            try files.copyItem(
                at: checkpoint.appendingPathComponent(file),
                to: weights.appendingPathComponent(file))
        }
        if case .functions(let names) = adapters {
            let place = data.appendingPathComponent("adapters")
            try files.createDirectory(at: place, withIntermediateDirectories: true)
            for name in names {
                try files.copyItem(
                    at: checkpoint.appendingPathComponent(name),
                    to: place.appendingPathComponent(name))
            }
        }
        let opened = try Checkpoint.open(checkpoint)
        try files.createDirectory(
            at: url.appendingPathComponent("tokenizer"), withIntermediateDirectories: true)
        for name in BundleMaker.texts {
            try Data("abc".utf8).write(to: url.appendingPathComponent("tokenizer/\(name)"))
        }
        var manifest = try #require(manifest(opened).object)
        let functions = JSONValue.object(manifest)["medphi"]?["coreml"]?["functions"]
        try Data(try #require(functions).text().utf8)
            .write(to: data.appendingPathComponent("functions.json"))
        let entries = try BundleMaker.entries(url)
        var ours = try #require(manifest["medphi"]?.object)
        ours["files"] = .array(entries.map(\.value))
        manifest["medphi"] = .object(ours)
        change(&manifest)
        let text = Data(JSONValue.object(manifest).text(.pretty).utf8)
        try text.write(to: url.appendingPathComponent(Manifest.fileName))
        let sums = entries.map { ($0.path, $0.sha256) } + [(Manifest.fileName, SHA256.hex(text))]
        try Data(sums.map { "\($0.1)  \($0.0)\n" }.sorted().joined().utf8)
            .write(to: url.appendingPathComponent("SHA256SUMS"))
        return try ModelBundle.open(url, check: false)
    }

    /// All files so far, as the manifest lists them.
    private static func entries(
        _ url: URL
    ) throws -> [(path: String, sha256: String, value: JSONValue)] {
        let paths = try FileManager.default.subpathsOfDirectory(atPath: url.path).sorted()
        return try paths.compactMap { path in
            let place = url.appendingPathComponent(path)
            if FileBytes.kind(of: place) != .file { return nil }
            let sha256 = try SHA256.hex(contentsOf: place)
            let bytes = FileBytes.size(of: place)
            let value: JSONValue = [
                "path": .string(path), "bytes": .integer(bytes), "sha256": .string(sha256),
            ]
            return (path, sha256, value)
        }
    }

    private func manifest(_ checkpoint: Checkpoint) -> JSONValue {
        [
            "metadata_version": "0.2", "kind": "llm", "name": .string(name),
            "compression": "float16", "assets": ["main": .string(BundleMaker.package)],
            "language": [
                "tokenizer": "tokenizer", "vocab_size": .integer(checkpoint.config.vocabSize),
                "max_context_length": .integer(context), "embedded_tokenizer": .bool(true),
                "function_map": [
                    "prefill": .array(names("prefill")), "decode": .array(names("decode")),
                ],
            ],
            "source": ["model_id": "mini", "revision": .null, "licence": "MIT"],
            "compilation": ["targets": .array([]), "date": "1970-01-01T00:00:00Z"],
            "medphi": [
                "schema": .integer(1), "coreml": coreml(checkpoint.config),
                "model": model(checkpoint.config), "tokenizer": tokenizer(),
                "quantization": quantization(),
                "generation": [
                    "stop_token_ids": .array([.integer(305)]), "special_token_ids": .object([:]),
                    "suppress_ranges": .array([]), "defaults": .object([:]),
                ],
                "adapters": adapterFacts(),
                "base_fingerprint": .string(Fingerprint(of: checkpoint).text),
                "memory": [
                    "weights": .integer(1000), "kv_per_token": .integer(512),
                    "kv": .integer(512 * context), "adapter_slots": .integer(10),
                    "resident": .integer(1010 + 512 * context),
                ],
                "cost": .object([:]), "export": .object([:]),
                "verification": [
                    "level": "spec", "spec": .object([:]), "graph": .null, "predict": .null,
                ],
                "exporter": ["mlx_medphi": "0.1.0"],
                "files": .array([]),
            ],
        ]
    }

    private func names(_ role: String) -> [JSONValue] {
        ([role] + built.map { "\(role)_\($0)" }).map { .string($0) }
    }

    /// Adapters that are built in.
    private var built: [String] {
        if case .functions(let names) = adapters { return names }
        return []
    }

    private func coreml(_ config: ModelConfig) -> JSONValue {
        var functions = JSONObject()
        for name in [""] + built.map({ "_\($0)" }) {
            functions["prefill\(name)"] = signature(config, width)
            functions["decode\(name)"] = signature(config, 1)
        }
        return [
            "functions": .object(functions), "default_function": "decode",
            "context_length": .integer(context), "prefill_width": .integer(width),
            "mask_value": .number(-10000),
            "compute_units": ["recommended": "cpu_and_gpu", "tried": .array([])],
            "min_os": ["ios": "18.0"],
        ]
    }

    private func signature(_ config: ModelConfig, _ width: Int) -> JSONValue {
        func tensor(_ name: String, _ shape: [Int], _ type: String) -> JSONValue {
            [
                "name": .string(name), "shape": .array(shape.map { .integer($0) }),
                "dtype": .string(type),
            ]
        }
        var inputs = [
            tensor("inputIds", [1, width], "int32"), tensor("position", [1], "int32"),
            tensor("causalMask", [1, 1, width, context], "float16"),
            tensor("lastIndex", [1], "int32"),
        ]
        if isLong(config) { inputs.append(tensor("ropeRow", [1], "int32")) }
        let cache = [config.layerCount, config.keyValueHeadCount, context, config.headSize]
        var states = [tensor("keyCache", cache, "float16"), tensor("valueCache", cache, "float16")]
        let slots = Projection.allCases.flatMap { projection in
            let shape = config.shape(of: projection)
            let module = projection.module
            return [
                tensor("loraA_\(module)", [config.layerCount, rank, shape.inputs], "float16"),
                tensor("loraB_\(module)", [config.layerCount, shape.outputs, rank], "float16"),
            ]
        }
        switch adapters {
        case .slots(.state): states += slots
        case .slots(.input): inputs += slots
        default: break
        }
        return [
            "inputs": .array(inputs),
            "outputs": .array([tensor("logits", [1, 1, config.vocabSize], "float16")]),
            "states": .array(states),
        ]
    }

    private func isLong(_ config: ModelConfig) -> Bool {
        config.switchLength.map { context > $0 } ?? false
    }

    private func model(_ config: ModelConfig) -> JSONValue {
        let factors = config.longRoPE == nil ? "none" : isLong(config) ? "both" : "short"
        return [
            "vocab_size": .integer(config.vocabSize), "hidden_size": .integer(config.hiddenSize),
            "intermediate_size": .integer(config.intermediateSize),
            "layers": .integer(config.layerCount), "heads": .integer(config.headCount),
            "kv_heads": .integer(config.keyValueHeadCount), "head_dim": .integer(config.headSize),
            "eps": .number(config.normEpsilon),
            "max_position_embeddings": .integer(config.maxPositions),
            "sliding_window": config.slidingWindow.map { .integer($0) } ?? .null,
            "tied_embeddings": .bool(config.tiesEmbeddings),
            "rope": [
                "type": config.longRoPE == nil ? "default" : "longrope",
                "theta": .number(config.ropeTheta), "factors": .string(factors),
                "attention_factor": .number(config.longRoPE?.attentionFactor ?? 1),
                "rotary_dim": .integer(config.rotarySize),
                "switch_length": config.switchLength.map { .integer($0) } ?? .null,
            ],
        ]
    }

    private func adapterFacts() -> JSONValue {
        var facts: JSONObject = [
            "mode": "none", "slot_kind": .null, "rank_slot": .null, "modules": .array([]),
            "list": .array([]),
        ]
        switch adapters {
        case .none: break
        case .fused: facts["mode"] = "fused"
        case .slots(let kind):
            facts["mode"] = "slots"
            facts["slot_kind"] = .string(kind.rawValue)
            facts["rank_slot"] = .integer(rank)
            facts["modules"] = .array(["qkv", "o", "gate_up", "down"])
        case .functions(let names):
            facts["mode"] = "functions"
            facts["list"] = .array(
                names.map {
                    [
                        "name": .string($0), "path": .null, "sha256": .null, "rank": .integer(8),
                        "functions": [
                            "prefill": .string("prefill_\($0)"), "decode": .string("decode_\($0)"),
                        ],
                        "training": .object([:]),
                    ]
                })
        }
        return .object(facts)
    }

    private func quantization() -> JSONValue {
        [
            "source": "none", "scheme": "block", "bits": .integer(16), "group": .null,
            "offset": "none", "embedding": ["bits": .integer(16), "group": .null],
            "head": ["bits": .integer(16), "group": .null], "exceptions": .object([:]),
            "error": .null, "subnormal_scales": .integer(0),
        ]
    }

    private func tokenizer() -> JSONValue {
        [
            "pipeline": "tokenizer.json", "path": "tokenizer/tokenizer.json",
            "sha256": .string(BundleMaker.hash),
            "chat_template": "tokenizer/chat_template.jinja",
            "chat_template_sha256": .string(BundleMaker.hash),
            "vectors": "tokenizer/vectors.json",
            "chat_format": [
                "name": "phi3", "opening": "", "closing": "<|endoftext|>", "after_role": "\n",
                "after_end": "\n", "knows_system": .bool(true), "skips_empty_system": .bool(false),
            ],
        ]
    }
}
