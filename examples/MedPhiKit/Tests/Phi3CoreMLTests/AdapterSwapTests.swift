#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Phi3Reference
    import Testing

    @testable import Phi3CoreML

    @Suite struct AdapterSwapTests {
        private static let options = AdapterOptions(allowsUnstatedBase: true)

        private func bound(_ name: String, _ rig: Rig) throws -> BoundAdapter {
            let url = Fixtures.mini.appendingPathComponent(name)
            return try bound(url, name, rig)
        }

        private func bound(_ url: URL, _ name: String, _ rig: Rig) throws -> BoundAdapter {
            BoundAdapter(
                try Adapter.load(url, for: rig.backend.facts.target, options: Self.options),
                name: name)
        }

        private func builtIn(_ name: String) -> BoundAdapter {
            BoundAdapter(
                id: AdapterID(name: name, sha256: name), adapter: nil,
                functions: ["prefill": "prefill_\(name)", "decode": "decode_\(name)"])
        }

        /// base → A → B → base, each with a sequence that begins like the one before.
        private func swap(_ rig: Rig, _ a: BoundAdapter, _ b: BoundAdapter) async throws {
            let ids = Fixtures.ids(20)
            let base = try RuntimeTests.mini.get()
            let models = try [a, b].map { adapter in
                let url = Fixtures.mini.appendingPathComponent(adapter.id.name)
                return try base.applyLoRA(url, options: Self.options)
            }
            let before = try await rig.backend.logits(after: ids, adapter: nil)
            #expect(difference(before, try reference(ids, base)) < halfPrecision)
            for (adapter, model) in zip([a, b], models) {
                let found = try await rig.backend.logits(after: ids, adapter: adapter)
                let wanted = try reference(ids, model)
                #expect(difference(found, wanted) < halfPrecision)
                // The adapters are strong enough that taking one for another would show.
                #expect(difference(found, before) > 4 * halfPrecision)
                let more = try await rig.backend.logits(after: ids + [5], adapter: adapter)
                #expect(difference(more, try reference(ids + [5], model)) < halfPrecision)
            }
            _ = rig.calls()
            #expect(try await rig.backend.logits(after: ids, adapter: nil) == before)
            #expect(rig.calls() == ["prefill 0", "prefill 16"])
            #expect(rig.bench.notes == [])
        }

        @Test(arguments: Manifest.Adapters.SlotKind.allCases)
        func slotsAreFilledAndEmptiedExactly(kind: Manifest.Adapters.SlotKind) async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .slots(kind)))
            try await swap(rig, try bound("peft_0", rig), try bound("peft_1", rig))
        }

        /// The same tensors under the same name, twice as strong.
        @Test(arguments: Manifest.Adapters.SlotKind.allCases)
        func anotherScaleIsAnotherAdapter(kind: Manifest.Adapters.SlotKind) async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .slots(kind)))
            let place = rig.folder["peft_0"]
            try FileManager.default.copyItem(
                at: Fixtures.mini.appendingPathComponent("peft_0"), to: place)
            let file = place.appendingPathComponent("adapter_config.json")
            let text = try String(contentsOf: file, encoding: .utf8)
            try text.replacing("\"lora_alpha\": 16", with: "\"lora_alpha\": 32")
                .write(to: file, atomically: true, encoding: .utf8)
            let (weak, strong) = (try bound("peft_0", rig), try bound(place, "peft_0", rig))
            #expect(weak.id.name == strong.id.name && weak.id != strong.id)
            let ids = Fixtures.ids(20)
            _ = try await rig.backend.logits(after: ids, adapter: weak)
            let found = try await rig.backend.logits(after: ids, adapter: strong)
            let model = try RuntimeTests.mini.get().applyLoRA(place, options: Self.options)
            #expect(difference(found, try reference(ids, model)) < halfPrecision)
        }

        @Test func functionsAreLoadedInPairs() async throws {
            let names = ["peft_0", "peft_1"]
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .functions(names)))
            try await swap(rig, builtIn(names[0]), builtIn(names[1]))
            rig.bench.clear()
            _ = try await rig.backend.logits(after: [1, 2], adapter: builtIn("peft_1"))
            #expect(rig.bench.loads == ["prefill_peft_1", "decode_peft_1"])
        }

        @Test func oneAdapterUnderTwoIDsIsReadTwice() async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .slots(.state)))
            let one = try bound("peft_0", rig)
            let two = BoundAdapter(
                id: AdapterID(name: one.id.name, sha256: "other"), adapter: one.adapter)
            let ids = Fixtures.ids(10)
            let first = try await rig.backend.logits(after: ids, adapter: one)
            _ = rig.calls()
            #expect(try await rig.backend.logits(after: ids, adapter: two) == first)
            #expect(rig.calls() == ["prefill 0"])
        }

        @Test func packagesWithoutRoomRefuseAdapters() async throws {
            for adapters in [BundleMaker.Adapters.none, .fused, .functions(["peft_0"])] {
                let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: adapters))
                let adapter = try bound("peft_0", rig)
                let error = await failure {
                    _ = try await rig.backend.logits(after: [1, 2], adapter: adapter)
                }
                guard case .adapterIncompatible = error else {
                    return #expect(error == nil, "not refused")
                }
                _ = try await rig.backend.logits(after: [1, 2], adapter: nil)
            }
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .slots(.state)))
            let error = await failure {
                _ = try await rig.backend.logits(after: [1, 2], adapter: builtIn("peft_0"))
            }
            guard case .adapterIncompatible = error else {
                return #expect(error == nil, "not refused")
            }
        }

        @Test func functionsThatDoNotLoadLeaveTheBase() async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16, adapters: .functions(["peft_0"])))
            let ids = Fixtures.ids(20)
            let before = try await rig.backend.logits(after: ids, adapter: nil)
            rig.bench.faults.refusedFunctions = ["decode_peft_0"]
            let error = await failure {
                _ = try await rig.backend.logits(after: ids, adapter: builtIn("peft_0"))
            }
            guard case .modelLoad = error else { return #expect(error == nil, "no load error") }
            #expect(try await rig.backend.logits(after: ids, adapter: nil) == before)
        }
    }
#endif
