import Foundation
import Testing

@testable import MedPhiKit
@testable import Phi3Core

/// Adapters on handles, and writing models.
@Suite struct LoadAdapterTests {
    private let prompt: [Int32] = [315, 259, 71, 274, 262, 279, 294, 61, 313, 306]

    private func logits(_ model: Phi3) async throws -> [Float] {
        try await model.engine.backend.logits(after: prompt, adapter: model.adapter)
    }

    @Test func swappedAdaptersLeaveTheBaseAsItWas() async throws {
        let base = try await Phi3.load(Places.mini, backend: .reference)
        let before = try await logits(base)
        let a = try await base.applyLoRA("a")
        let b = try await a.applyLoRA("b")
        #expect(a.activeAdapter?.name == "a" && b.activeAdapter?.name == "b")
        let (underA, underB) = (try await logits(a), try await logits(b))
        #expect(underA != before && underB != before && underA != underB)
        #expect(try await logits(b.removingLoRA()) == before)
        #expect(try await logits(base) == before)
        #expect(try await logits(a) == underA)
    }

    /// The same tensors under the same name, twice as strong.
    @Test func anotherScaleIsAnotherAdapter() async throws {
        let room = try Room()
        let options = AdapterOptions(allowsUnstatedBase: true)
        let source = Places.phi3.appendingPathComponent("mini-4k/peft_0")
        let place = try room.copy(source, "peft_0")
        try change(
            place.appendingPathComponent("adapter_config.json"), "\"lora_alpha\": 16",
            "\"lora_alpha\": 32")
        for base in [
            try await Phi3.load(Places.mini, backend: .reference),
            try await Phi3.load(Places.phi3.appendingPathComponent("mini-4k")),
        ] {
            let weak = try await base.applyLoRA(.file(source), options: options)
            let strong = try await base.applyLoRA(.file(place), options: options)
            #expect(weak.activeAdapter?.name == strong.activeAdapter?.name)
            #expect(weak.activeAdapter != strong.activeAdapter)
            let before = try await logits(weak)
            #expect(try await logits(strong) != before)
            #expect(try await logits(weak) == before)
        }
    }

    /// Under each adapter the logits are those that were recorded with it.
    @Test(arguments: [nil, "peft_0", "peft_1", "peft_2"])
    func adaptersOnACheckpointGiveTheRecordedLogits(name: String?) async throws {
        let folder = Places.phi3.appendingPathComponent("mini-4k")
        let base = try await Phi3.load(folder)
        var model = base
        if let name {
            model = try await base.applyLoRA(
                .file(folder.appendingPathComponent(name)),
                options: AdapterOptions(allowsUnstatedBase: true))
        }
        let place = name.map { folder.appendingPathComponent($0) } ?? folder
        let ids = try #require(
            try SafetensorsFile(folder.appendingPathComponent("reference.safetensors"))
                .tensor("ids"))
        let recorded = try #require(
            try SafetensorsFile(place.appendingPathComponent("reference.safetensors"))
                .tensor("logits"))
        let length = ids.shape[1]
        let row = ids.data.withUnsafeBytes { bytes in
            (0..<length).map { bytes.loadUnaligned(fromByteOffset: $0 * 4, as: Int32.self) }
        }
        let size = recorded.shape[2]
        let expected = recorded.floats()[(length - 1) * size..<length * size]
        let found = try await model.engine.backend.logits(after: row, adapter: model.adapter)
        let difference = zip(found, expected).map { abs($0 - $1) }.max() ?? .infinity
        #expect(found.count == size && difference < 1e-4)
    }

    @Test func everyFormOfAnAdapterIsTheSame() async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.tiny)
        let pack = try await base.applyLoRA(.file(Places.notes))
        let expected = try await logits(pack)
        #expect(try await logits(base) != expected)
        try await pack.saveLoRA(room["own.safetensors"])
        try await pack.saveLoRA(room["folder"])
        let own = try await base.applyLoRA(.named(room["own.safetensors"].path))
        #expect(own.activeAdapter?.name == "own")
        #expect(try await logits(own) == expected)
        // The folder holds mlx-lm's file and PEFT's; each is read where the other is missing.
        let peft = try room.copy(room["folder"], "peft")
        let mlx = try room.copy(room["folder"], "mlx")
        try FileManager.default.removeItem(
            at: peft.appendingPathComponent("adapters.safetensors"))
        try FileManager.default.removeItem(
            at: mlx.appendingPathComponent("adapter_model.safetensors"))
        for place in [room["folder"], peft, mlx] {
            let model = try await base.applyLoRA(
                .file(place), options: AdapterOptions(allowsUnstatedBase: true))
            #expect(try await logits(model) == expected)
        }
    }

    @Test func anAdapterOfAnotherBaseIsRefused() async throws {
        let base = try await Phi3.load(Places.mini, backend: .reference)
        let refusal = await problem { _ = try await base.applyLoRA(.file(Places.notes)) }
        guard case .adapterIncompatible(let list) = refusal else {
            Issue.record("found \(String(describing: refusal))")
            return
        }
        #expect(list.problems.count > 1)
    }

    @Test func aSavedCheckpointWritesAsTheAdaptedOne() async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.tiny)
        let model = try await base.applyLoRA(.file(Places.notes))
        let expected = try await logits(model)
        try await model.save(room["fused"])
        let again = try await Phi3.load(room["fused"])
        let found = try await logits(again)
        // Sums were rounded to half precision.
        #expect((zip(found, expected).map { abs($0 - $1) }.max() ?? .infinity) < 0.05)
        #expect(again.activeAdapter == nil && again.info.fingerprint != base.info.fingerprint)
        await #expect(throws: Phi3Error.self) { try await model.save(room["fused"]) }
        try await model.save(room["fused"], replace: true)
    }
}

/// Bundles that are copied with an adapter more.
@Suite struct LoadCopyTests {
    @Test func aSavedBundleHasTheAdapterAmongItsOwn() async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.mini, backend: .reference)
        let file = try Self.third(room)
        let model = try await base.applyLoRA(
            .file(file), options: AdapterOptions(allowsUnstatedBase: true))
        try await model.save(room["c.medphi"])
        let again = try await Phi3.load(room["c.medphi"], backend: .reference)
        #expect(again.adapters == ["a", "b", "third"])
        let named = try await again.applyLoRA("third")
        let prompt: [Int32] = [315, 259, 71, 306]
        let one = try await model.respond(to: .ids(prompt), GenerationOptions(maxTokens: 12))
        let other = try await named.respond(to: .ids(prompt), GenerationOptions(maxTokens: 12))
        #expect(one.ids == other.ids)
        let packed = try Adapter.load(
            room["c.medphi"].appendingPathComponent("adapters/third.safetensors"),
            for: AdapterTarget(try ModelBundle.open(room["c.medphi"]).manifest))
        #expect(packed.scaling.rank == 8 && packed.form == .slotPack)
        // Once more: there is an adapter of this name by now.
        let twice = await problem { try await Self.save(again, file, room["d.medphi"]) }
        #expect(twice?.description.contains("has another adapter") == true)
        #expect(FileBytes.kind(of: room["d.medphi"]) == .missing)
    }

    @Test func anAdapterThatWasSavedByItselfIsStillTheBundlesOwn() async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.mini, backend: .reference)
        let own = try await base.applyLoRA("a")
        try await own.saveLoRA(room["a.safetensors"])
        let back = try await base.applyLoRA(room["a.safetensors"])
        try await back.save(room["c.medphi"])
        #expect(try ModelBundle.open(room["c.medphi"]).adapters.keys.sorted() == ["a", "b"])
        let single = await problem { try await own.save(room["c.safetensors"]) }
        #expect(single?.description.contains("NAME.medphi") == true)
    }

    @Test func aBundleWithoutNewAdaptersIsCopiedByteForByte() async throws {
        let room = try Room()
        let own = try room.copy(Places.mini, "b.medphi")
        let base = try await Phi3.load(own, backend: .reference)
        try await base.applyLoRA("a").save(room["c.medphi"])
        for name in ["metadata.json", "SHA256SUMS", "adapters/a.safetensors"] {
            let copied = try Data(contentsOf: room["c.medphi"].appendingPathComponent(name))
            #expect(copied == (try Data(contentsOf: Places.mini.appendingPathComponent(name))))
        }
        _ = try ModelBundle.open(room["c.medphi"])
        // Only a bundle is ever replaced.
        try await base.save(room["c.medphi"], replace: true)
        try FileManager.default.createDirectory(
            at: room["letters"], withIntermediateDirectories: true)
        await #expect(throws: Phi3Error.self) {
            try await base.save(room["letters"], replace: true)
        }
        await #expect(throws: Phi3Error.self) {
            try await base.save(own.appendingPathComponent("in"), replace: true)
        }
    }

    @Test func anAlteredBundleIsNotPassedOn() async throws {
        let room = try Room()
        let copy = try room.copy(Places.mini, "b.medphi")
        let base = try await Phi3.load(copy, backend: .reference)
        try Data("other".utf8).write(to: copy.appendingPathComponent("NOTICE"))
        let refusal = await problem { try await base.save(room["c.medphi"]) }
        #expect(refusal?.description.contains("NOTICE is altered") == true)
        let left = try FileManager.default.contentsOfDirectory(atPath: room.url.path)
        #expect(left == ["b.medphi"])
    }

    /// A whole bundle of the same name was put where the loaded one was.
    @Test func whatWasReplacedSinceItWasLoadedIsNotPassedOn() async throws {
        let room = try Room()
        let copy = try room.copy(Places.mini, "b.medphi")
        let file = try Self.third(room)
        let base = try await Phi3.load(copy, backend: .reference)
        let manifest = copy.appendingPathComponent(Manifest.fileName)
        let sums = copy.appendingPathComponent("SHA256SUMS")
        let listed = try String(contentsOf: sums, encoding: .utf8)
        let old = try SHA256.hex(contentsOf: manifest)
        try change(manifest, "\"licence\": ", "\"licence\":  ")
        try change(sums, old, try SHA256.hex(contentsOf: manifest))
        _ = try ModelBundle.open(copy)
        let refusal = await problem { try await base.save(room["c.medphi"]) }
        #expect(refusal?.description.contains("metadata.json is altered") == true)
        let other = await problem { try await Self.save(base, file, room["c.medphi"]) }
        #expect(other?.description.contains("metadata.json is altered") == true)
        // The manifest as it was, beside hashes of something else.
        try change(manifest, "\"licence\":  ", "\"licence\": ")
        try listed.replacing("  NOTICE\n", with: "  NOTICES\n")
            .write(to: sums, atomically: true, encoding: .utf8)
        await #expect(throws: Phi3Error.self) { try await base.save(room["c.medphi"]) }
        try listed.write(to: sums, atomically: true, encoding: .utf8)
        let left = try FileManager.default.contentsOfDirectory(atPath: room.url.path).sorted()
        #expect(left == ["b.medphi", "third"])
        try await base.save(room["c.medphi"])
    }

    @Test func aCancelledTaskLeavesNoHalfBundle() async throws {
        let room = try Room()
        let bundle = try ModelBundle.open(Places.mini)
        let place = room["c.medphi"]
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            try bundle.copy(to: place)
        }
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(try FileManager.default.contentsOfDirectory(atPath: room.url.path) == [])
    }

    @Test(arguments: ["decode", "9lives", "with space", "a-b-c-é", "A", "base"])
    func impossibleNamesAreRefused(name: String) async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.mini, backend: .reference)
        let source = Places.phi3.appendingPathComponent("mini-4k/peft_0")
        let file = try room.copy(source, name)
        let refusal = await problem { try await Self.save(base, file, room["c.medphi"]) }
        #expect(refusal?.description.contains("cannot be added") == true)
    }

    private static func third(_ room: Room) throws -> URL {
        try room.copy(Places.phi3.appendingPathComponent("mini-4k/peft_0"), "third")
    }

    private static func save(_ base: Phi3, _ file: URL, _ url: URL) async throws {
        let options = AdapterOptions(allowsUnstatedBase: true)
        try await base.applyLoRA(.file(file), options: options).save(url)
    }
}
