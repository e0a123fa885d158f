import Foundation
import Testing

@testable import Phi3Core

/// Adapters of the small checkpoint, and copies of them to be spoiled.
enum Small {
    static let base = FileFixtures.mini
    static let made = FileFixtures.root.appendingPathComponent(
        "examples/MedPhiKit/Tests/Fixtures/mini-4k")
    static let file = made.appendingPathComponent("changes.safetensors")
    static let pack = made.appendingPathComponent("slots.safetensors")
    static let peft = base.appendingPathComponent("peft_1")

    static func target() throws -> AdapterTarget {
        let checkpoint = try Checkpoint.open(base)
        return AdapterTarget(checkpoint, fingerprint: Fingerprint(of: checkpoint))
    }

    /// A file with tensors and metadata changed.
    static func rewritten(
        _ url: URL, to place: URL, facts: [String: String?] = [:], without: [String] = [],
        adding: [TensorPiece] = [], _ change: (String, Tensor) -> Tensor = { $1 }
    ) throws {
        let file = try SafetensorsFile(url)
        var metadata = file.header.metadata
        for (name, text) in facts { metadata[name] = text }
        let pieces = file.header.namesByPlace.filter { !without.contains($0) }.compactMap { name in
            file.tensor(name).map { TensorPiece(name: name, change(name, $0)) }
        }
        try SafetensorsWriter.write(
            to: place, pieces: pieces + adding,
            metadata: metadata.sorted { $0.key < $1.key }.map { (name: $0.key, text: $0.value) },
            replace: true)
    }

    /// A copy of the PEFT folder with its settings changed.
    static func peftCopy(_ changes: [String: JSONValue]) throws -> TestFolder {
        let folder = try TestFolder()
        try FileManager.default.copyItem(
            at: peft.appendingPathComponent(Adapter.peftName), to: folder[Adapter.peftName])
        var config =
            try FileBytes.json(peft.appendingPathComponent(Adapter.configName)).object ?? [:]
        for (name, value) in changes { config[name] = value }
        try folder.write(JSONValue.object(config).text(), Adapter.configName)
        return folder
    }
}

@Suite struct AdapterTests {
    @Test func aFileOfThePythonPackageIsRead() throws {
        let adapter = try Adapter.load(Small.file, for: Small.target())
        #expect(adapter.form == .file && adapter.scaling == .init(rank: 4, scale: 4, isDoRA: false))
        #expect(
            adapter.projections == [.qkv, .o] && adapter.layers == [0, 1]
                && adapter.modelLayers == 2)
        #expect(
            adapter.weightsSHA256
                == "4b1717bd16eea74e15018ba47265fdf212dd52a7d1262ce6c21c05de05c76ed6")
        #expect(adapter.origin.training["rows"] == 3.json)
        #expect(adapter.changes.values.allSatisfy { $0.a.type == .f16 && $0.rank == 4 })
        #expect(!adapter.hasNoEffect)
    }

    @Test func aSlotPackOfThePythonPackageIsReadAndGivesItsSlotsBack() throws {
        var target = try Small.target()
        target.slotRank = 8
        let adapter = try Adapter.load(Small.pack, for: target)
        #expect(
            adapter.form == .slotPack && adapter.scaling.scale == 1 && adapter.scaling.rank == 4)
        #expect(
            adapter.weightsSHA256
                == "165e16c6e402fc963994c1d7f24dd979371bd0c6493034c67bbf65b9132e89ca")
        #expect(adapter.origin.tokenizerSHA256 == String(repeating: "1", count: 64))
        let file = try SafetensorsFile(Small.pack)
        for source in [adapter, try Adapter.load(Small.file, for: target)] {
            let slots = try AdapterSlots(source, for: target).slots
            #expect(slots.map(\.name) == file.header.tensors.keys.sorted())
            for slot in slots {
                #expect(slot.shape == file.tensor(slot.name)?.shape)
                #expect(slot.bits.withUnsafeBytes { Data($0) } == file.tensor(slot.name)?.data)
            }
        }
    }

    @Test func foldersOfPEFTAndOfMLXHoldTheSameNumbers() throws {
        let peft = try Adapter.read(Small.peft)
        let file = try Adapter.read(Small.file)
        let folder = try TestFolder()
        #expect(peft.form == .peft && peft.scaling == file.scaling)
        try peft.write(to: folder["both"])
        let both = try Adapter.read(folder["both"])
        #expect(both.form == .both && both.weightsSHA256 == peft.weightsSHA256)
        try FileManager.default.removeItem(at: folder["both/\(Adapter.peftName)"])
        #expect(try Adapter.read(folder["both"]).form == .mlx)
        try peft.write(to: folder["half.safetensors"], as: .f16)
        #expect(try Adapter.read(folder["half.safetensors"]).weightsSHA256 == file.weightsSHA256)
        // mlx-lm's own files say nothing about themselves.
        try Small.rewritten(
            folder["both/\(Adapter.mlxName)"], to: folder["both/\(Adapter.mlxName)"],
            facts: ["format": nil])
        let plain = try Adapter.read(folder["both"])
        #expect(plain.weightsSHA256 == peft.weightsSHA256 && plain.origin.baseFingerprint == nil)
        try Small.rewritten(
            folder["both/\(Adapter.mlxName)"], to: folder["both/\(Adapter.mlxName)"],
            without: [
                "model.layers.1.self_attn.o_proj.lora_a", "model.layers.1.self_attn.o_proj.lora_b",
            ])
        #expect(
            names(
                listedProblems { _ = try Adapter.read(folder["both"]) },
                "model.layers.1.self_attn.o_proj: missing"))
    }

    @Test func anotherBaseIsRefusedWithAllDifferences() throws {
        var target = try Small.target()
        target.fingerprint = Fingerprint(String(repeating: "0", count: 64))
        target.layerCount = 1
        let lines = listedProblems { _ = try Adapter.load(Small.file, for: target) }
        #expect(
            names(lines, "base fingerprint") && names(lines, "model.layers.1.self_attn.qkv_proj"))
        let options = AdapterOptions(allowsOtherBase: true)
        #expect(
            !names(
                listedProblems { _ = try Adapter.load(Small.file, for: target, options: options) },
                "base"))
    }

    @Test func anAdapterOfTheQuantisedBaseNeedsThatQuantisation() throws {
        let folder = try TestFolder()
        let target = try Small.target()
        let place = folder["q.safetensors"]
        try Small.rewritten(
            Small.file, to: place, facts: ["base_fingerprint": "\(target.fingerprint)-q4g64"])
        #expect(
            names(
                listedProblems { _ = try Adapter.load(place, for: target) },
                "was trained on this base with 4 bits"))
        var quantized = target
        quantized.quantizedOnExport = .init(bits: 4, groupSize: 64)
        _ = try Adapter.load(place, for: quantized)
        quantized.quantizedOnExport = .init(bits: 8, groupSize: 64)
        #expect(throws: Phi3Error.self) { try Adapter.load(place, for: quantized) }
    }

    @Test func tokenizerAndTemplateMustBeTheOnesItGoesWith() throws {
        var target = try Small.target()
        target.slotRank = 2
        target.tokenizerSHA256 = String(repeating: "3", count: 64)
        target.chatTemplateSHA256 = String(repeating: "3", count: 64)
        let lines = listedProblems { _ = try Adapter.load(Small.pack, for: target) }
        #expect(
            names(lines, "tokenizer") && names(lines, "chat template") && names(lines, "rank is 4"))
    }

    @Test func factorsBeyondHalfPrecisionDoNotFitSlots() throws {
        let folder = try TestFolder()
        let place = folder["big.safetensors"]
        var target = try Small.target()
        target.slotRank = 8
        let peft = try Adapter.read(Small.peft)
        let big = Adapter(
            url: place,
            changes: peft.changes.mapValues {
                LowRank(
                    a: $0.a, b: Tensor($0.b.floats().map { $0 * 1e6 }, shape: $0.b.shape), m: nil)
            }, scaling: peft.scaling, modelLayers: 2, origin: peft.origin, form: .file)
        let lines = big.problems(on: target, options: AdapterOptions(allowsUnstatedBase: true))
        #expect(lines.count == 4 && lines.allSatisfy { $0.contains("half precision") })
        #expect(throws: Phi3Error.self) { try AdapterSlots(big, for: target) }
    }

    @Test func everythingWrongWithAFileIsNamedTogether() throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        let site = "model.layers.0.self_attn.o_proj"
        var target = try Small.target()
        target.fingerprint = Fingerprint("other")
        try Small.rewritten(
            Small.file, to: place, facts: ["tensors": "8"], without: ["\(site).lora_a"],
            adding: [
                TensorPiece(name: "model.layers.0.mlp.up.lora_a", Tensor([1], shape: [1])),
                TensorPiece(name: "extra", Tensor([1], shape: [1])),
            ]
        ) { name, tensor in
            name == "model.layers.1.self_attn.o_proj.lora_b"
                ? Tensor(tensor.floats().map { _ in .nan }, shape: tensor.shape, as: .f16) : tensor
        }
        let lines = listedProblems { _ = try Adapter.load(place, for: target) }
        for part in [
            "\(site).lora_a: missing", "extra:", "model.layers.0.mlp.up.lora_a:", "9 tensors",
            "model.layers.1.self_attn.o_proj.lora_b: holds values", "base fingerprint",
        ] {
            #expect(names(lines, part), "\(part)")
        }
    }

    @Test func oneChangedBitIsNoticed() throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        for source in [Small.file, Small.pack] {
            var data = try Data(contentsOf: source)
            data[data.count - 3] ^= 1
            try data.write(to: place)
            #expect(
                names(listedProblems { _ = try Adapter.read(place) }, "its values are not those"))
        }
    }

    @Test func newerFormsAskForAnUpdate() throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        for (source, facts) in [
            (Small.file, ["version": "2"]), (Small.pack, ["format": "medphi-slots-2"]),
        ] as [(URL, [String: String?])] {
            try Small.rewritten(source, to: place, facts: facts)
            #expect {
                try Adapter.read(place)
            } throws: {
                if case Phi3Error.unsupportedSchema = $0 { return true }
                return false
            }
        }
    }

    @Test func whatIsInTheWayStays() throws {
        let folder = try TestFolder()
        let adapter = try Adapter.read(Small.file)
        try folder.write("mine", "x.safetensors")
        try folder.write("mine", "full/notes.txt")
        #expect(throws: Phi3Error.self) {
            try adapter.write(to: folder["x.safetensors"], replace: true)
        }
        #expect(throws: Phi3Error.self) { try adapter.write(to: folder["full"], replace: true) }
        #expect(throws: Phi3Error.self) { try adapter.write(to: folder["y.safetensors"], as: .u32) }
        #expect(try String(contentsOf: folder["x.safetensors"], encoding: .utf8) == "mine")
        #expect(
            try FileManager.default.contentsOfDirectory(atPath: folder.url.path).sorted() == [
                "full", "x.safetensors",
            ])
    }

    @Test(arguments: [
        ("microsoft/Phi-3-mini", "microsoft/Phi-3-mini"), ("/home/me/models/mini", "mini"),
        ("mini", "mini"),
        ("/cache/models--a--b-c/snapshots/12", "a/b-c"), ("./x/y", "y"), ("x/", "x"), ("/", ""),
        ("", ""),
    ])
    func aBaseIsNamedWithoutItsPath(name: String, label: String) {
        #expect(Adapter.baseLabel(name) ?? "" == label)
    }
}
