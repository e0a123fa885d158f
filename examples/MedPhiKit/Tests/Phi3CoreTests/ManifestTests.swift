import Foundation
import Testing

@testable import Phi3Core

@Suite struct ManifestTests {
    private func problems(_ value: JSONValue) -> [String] {
        listedProblems { _ = try Manifest.parse(value) }
    }

    @Test func aManifestIsReadKeyForKey() throws {
        let manifest = try Manifest.parse(ManifestFixture.value())
        #expect(manifest.name == "notes")
        #expect(manifest.mainAsset == "model/Phi3.mlpackage")
        #expect(manifest.language.functionMap["decode"] == ["decode"])
        #expect(manifest.source.revision == nil)
        let ours = manifest.medphi
        #expect(ours.coreml.functions["prefill"]?.inputs.first?.shape == [1, 16])
        #expect(ours.coreml.maskValue == -10000)
        #expect(ours.coreml.recommendedUnits == .cpuAndGPU)
        #expect(ours.model.slidingWindow == nil)
        #expect(ours.model.rope.factors == .none)
        #expect(ours.quantization.embedding.bits == 16)
        #expect(ours.generation.suppressRanges == [310...319])
        #expect(ours.adapters.slotKind == .state)
        #expect(ours.adapters.list.first?.sha256 == ManifestFixture.hash)
        #expect(ours.verification.level == .spec)
        #expect(ours.exporter["commit"] == .some(nil))
        #expect(ours.files.count == 5)
    }

    @Test func everyKeyThatIsMissingIsNamed() throws {
        for path in ManifestFixture.keyPaths() {
            let spoiled = ManifestFixture.changed(path, to: nil)
            #expect(throws: Phi3Error.self, "\(path)") { try Manifest.parse(spoiled) }
            if path.first != "medphi" || path.count > 2 || path.last != "schema" {
                let lines = problems(spoiled)
                #expect(
                    names(lines, "\(path.joined(separator: ".")) is missing") || path == ["medphi"],
                    "\(path)")
            }
        }
    }

    @Test func everyValueOfAnotherKindIsNamed() {
        for path in ManifestFixture.keyPaths() where path != ["medphi"] && path.last != "schema" {
            let lines = problems(ManifestFixture.changed(path, to: .number(-0.5)))
            let free = ["mask_value", "eps", "theta", "attention_factor", "error"]
            if free.contains(path.last ?? "") { continue }
            #expect(names(lines, path.joined(separator: ".")), "\(path): \(lines)")
        }
    }

    @Test func keysBesideTheKnownOnesAreLeftAlone() throws {
        _ = try Manifest.parse(ManifestFixture.changed(["user_data"], to: "x"))
        _ = try Manifest.parse(ManifestFixture.changed(["medphi", "later"], to: .null))
    }

    @Test func aNewerSchemaAsksForAnUpdate() {
        let value = ManifestFixture.changed(["medphi", "schema"], to: 2.json)
        #expect {
            try Manifest.parse(value)
        } throws: {
            guard case Phi3Error.unsupportedSchema = $0 else { return false }
            return "\($0)".contains("Update")
        }
        for bad in [0.json, "1", .bool(true), .number(1)] as [JSONValue] {
            #expect(throws: Phi3Error.self) {
                try Manifest.parse(ManifestFixture.changed(["medphi", "schema"], to: bad))
            }
        }
    }

    @Test(arguments: [
        "/etc/passwd", "..", "../x", "a/../b", "a//b", "./a", "", "a/", "a\\b", "c:d", "a\u{0}",
        "a\u{202E}b", "a\nb",
    ])
    func pathsThatLeaveTheBundleAreRefused(path: String) {
        for place in [
            ["assets", "main"], ["medphi", "tokenizer", "vectors"], ["language", "tokenizer"],
        ] {
            #expect(
                names(
                    problems(ManifestFixture.changed(place, to: .string(path))),
                    place.joined(separator: ".")))
        }
    }

    @Test func contradictionsAreAllNamed() {
        func with(_ path: [String], _ value: JSONValue) -> [String] {
            problems(ManifestFixture.changed(path, to: value))
        }
        let function = ["medphi", "coreml", "default_function"]
        #expect(names(with(function, "none"), "medphi.coreml.functions lacks none"))
        #expect(
            names(
                with(["medphi", "coreml", "prefill_width"], 65.json), "medphi.coreml.prefill_width")
        )
        #expect(
            names(
                with(["medphi", "coreml", "prefill_width"], 0.json), "medphi.coreml.prefill_width"))
        #expect(
            names(
                with(["medphi", "generation", "stop_token_ids"], .array([])), "medphi.generation"))
        #expect(
            names(with(["medphi", "verification", "level"], "graph"), "medphi.verification.graph"))
        #expect(names(with(["medphi", "adapters", "mode"], "none"), "medphi.adapters.slot_kind"))
        #expect(
            names(with(["medphi", "adapters", "rank_slot"], .null), "medphi.adapters.slot_kind"))
        let hash = JSONValue.string(String(repeating: "b", count: 64))
        #expect(
            names(with(["medphi", "tokenizer", "sha256"], hash), "medphi.files: another SHA-256"))
        #expect(
            names(with(["assets", "main"], "other"), "medphi.files: lists nothing of assets.main"))
        #expect(
            names(
                with(["medphi", "tokenizer", "vectors"], "none.json"),
                "medphi.files: lacks none.json"))
        let ranges: JSONValue = .array([.array([9.json, 1.json])])
        #expect(
            names(
                with(["medphi", "generation", "suppress_ranges"], ranges),
                "medphi.generation.suppress"))
        let files = ManifestFixture.value()["medphi"]?["files"]?.array ?? []
        #expect(names(with(["medphi", "files"], .array(files + [files[0]])), "medphi.files holds"))
        let empty: JSONValue = .array([["name": "x", "shape": .array([0.json]), "dtype": "int32"]])
        let inputs = ["medphi", "coreml", "functions", "decode", "inputs"]
        #expect(names(with(inputs, empty), "medphi.coreml.functions.decode.x"))
    }

    @Test func spoiledManifestsNeverCrash() throws {
        var generator = SplitMix(1)
        let value = ManifestFixture.value()
        var accepted = 0
        for _ in 0..<FileFixtures.fuzzCount(2000) {
            let spoiled = Spoiler.value(value, &generator)
            do {
                let manifest = try Manifest.parse(spoiled)
                accepted += 1
                let target = AdapterTarget(manifest)
                _ = try? AdapterSlots(nil, for: target)
            } catch {
                #expect(isReadable(error))
            }
        }
        // Some values may be anything; if none were accepted, the fixture itself would be wrong.
        #expect(accepted > 0)
    }
}

/// A manifest as the exporter writes it, for a model of two blocks.
enum ManifestFixture {
    static let hash = String(repeating: "a", count: 64)

    /// The keys of all objects that must be there.
    static func keyPaths() -> [[String]] {
        let free = [
            "training", "defaults", "cost", "export", "spec", "special_token_ids", "min_os",
            "exporter", "exceptions", "function_map", "functions",
        ]
        func paths(_ value: JSONValue, _ path: [String]) -> [[String]] {
            guard let members = value.object, !free.contains(path.last ?? "") else { return [] }
            return members.flatMap { [path + [$0.name]] + paths($0.value, path + [$0.name]) }
        }
        return paths(value(), [])
    }

    /// The fixture with one value replaced, or dropped.
    static func changed(_ path: [String], to new: JSONValue?) -> JSONValue {
        func change(_ value: JSONValue, _ rest: ArraySlice<String>) -> JSONValue {
            guard let name = rest.first, var members = value.object else { return value }
            members[name] =
                rest.count == 1
                ? new : members[name].map { change($0, rest.dropFirst()) }
            return .object(members)
        }
        return change(value(), path[...])
    }

    static func value() -> JSONValue {
        [
            "metadata_version": "0.2", "kind": "llm", "name": "notes", "compression": "float16",
            "assets": ["main": "model/Phi3.mlpackage"],
            "language": [
                "tokenizer": "tokenizer", "vocab_size": 320.json, "max_context_length": 64.json,
                "embedded_tokenizer": .bool(true),
                "function_map": ["prefill": .array(["prefill"]), "decode": .array(["decode"])],
            ],
            "source": ["model_id": "mini", "revision": .null, "licence": "MIT"],
            "compilation": ["targets": .array([]), "date": "1970-01-01T00:00:00Z"],
            "medphi": medphi(),
        ]
    }

    private static func medphi() -> JSONValue {
        [
            "schema": 1.json, "coreml": coreml(), "model": model(), "tokenizer": tokenizer(),
            "quantization": [
                "source": "none", "scheme": "block", "bits": 16.json, "group": .null,
                "offset": "none",
                "embedding": ["bits": 16.json, "group": .null],
                "head": ["bits": 16.json, "group": .null],
                "exceptions": .object(JSONObject()), "error": .null, "subnormal_scales": 0.json,
            ],
            "generation": [
                "stop_token_ids": .array([305.json]), "special_token_ids": ["end": 7.json],
                "suppress_ranges": .array([.array([310.json, 319.json])]),
                "defaults": .object(JSONObject()),
            ],
            "adapters": [
                "mode": "slots", "slot_kind": "state", "rank_slot": 8.json,
                "modules": .array(["qkv", "o", "gate_up", "down"]),
                "list": .array([
                    [
                        "name": "soap", "path": "adapters/soap.safetensors",
                        "sha256": .string(hash),
                        "rank": 8.json, "functions": .object(JSONObject()),
                        "training": .object(JSONObject()),
                    ]
                ]),
            ],
            "base_fingerprint": .string(hash),
            "memory": [
                "weights": 100.json, "kv_per_token": 512.json, "kv": 32768.json,
                "adapter_slots": 10.json, "resident": 40000.json,
            ],
            "cost": .object(JSONObject()), "export": .object(JSONObject()),
            "verification": [
                "level": "spec", "spec": ["ok": .bool(true)], "graph": .null, "predict": .null,
            ],
            "exporter": ["mlx_medphi": "0.1.0", "commit": .null],
            "files": .array(
                [
                    "adapters/soap.safetensors", "model/Phi3.mlpackage/Manifest.json",
                    "tokenizer/chat_template.jinja", "tokenizer/tokenizer.json",
                    "tokenizer/vectors.json",
                ].map { ["path": .string($0), "bytes": 3.json, "sha256": .string(hash)] }),
        ]
    }

    private static func coreml() -> JSONValue {
        func signature(_ width: Int) -> JSONValue {
            [
                "inputs": .array([
                    ["name": "inputIds", "shape": .array([1.json, width.json]), "dtype": "int32"]
                ]),
                "outputs": .array([
                    ["name": "logits", "shape": .array([1.json, 320.json]), "dtype": "float16"]
                ]),
                "states": .array([]),
            ]
        }
        return [
            "functions": ["prefill": signature(16), "decode": signature(1)],
            "default_function": "decode",
            "context_length": 64.json, "prefill_width": 16.json, "mask_value": .number(-10000),
            "compute_units": ["recommended": "cpu_and_gpu", "tried": .array([])],
            "min_os": ["ios": "18.0"],
        ]
    }

    private static func model() -> JSONValue {
        [
            "vocab_size": 320.json, "hidden_size": 64.json, "intermediate_size": 96.json,
            "layers": 2.json,
            "heads": 4.json, "kv_heads": 4.json, "head_dim": 16.json, "eps": .number(1e-5),
            "max_position_embeddings": 4096.json, "sliding_window": .null,
            "tied_embeddings": .bool(false),
            "rope": [
                "type": "default", "theta": 10000.json, "factors": "none",
                "attention_factor": 1.json,
                "rotary_dim": 16.json, "switch_length": .null,
            ],
        ]
    }

    private static func tokenizer() -> JSONValue {
        [
            "pipeline": "tokenizer.json", "path": "tokenizer/tokenizer.json",
            "sha256": .string(hash),
            "chat_template": "tokenizer/chat_template.jinja", "chat_template_sha256": .string(hash),
            "vectors": "tokenizer/vectors.json",
            "chat_format": [
                "name": "phi3", "opening": "", "closing": "<|endoftext|>", "after_role": "\n",
                "after_end": "\n", "knows_system": .bool(true), "skips_empty_system": .bool(false),
            ],
        ]
    }
}
