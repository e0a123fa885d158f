import Foundation
import Testing

@testable import MedPhiKit

/// Loading from files, and what is refused.
@Suite struct LoadTests {
    @Test func aBundleIsVerifiedLoadedAndDescribed() async throws {
        let events = Events()
        let model = try await Phi3.load(
            Places.mini, backend: .reference, progress: { events.add($0) })
        #expect(model.backendName == "reference" && model.contextLength == 64)
        #expect(model.info.source == .bundle(Places.mini) && model.adapters == ["a", "b"])
        #expect(model.info.verification == .graph && model.state == .ready)
        let seen = events.all
        #expect(seen.contains(.loading) && seen.last == .ready)
        let whole = seen.compactMap { event -> Bool? in
            if case .verifying(let done, let total) = event { return done == total }
            return nil
        }
        #expect(whole.last == true)
    }

    @Test func withoutVerificationNothingIsHashed() async throws {
        let events = Events()
        let options = LoadOptions(verify: false, context: 32)
        let model = try await Phi3.load(
            Places.mini, options: options, progress: { events.add($0) })
        #expect(model.contextLength == 32 && events.all == [.loading, .ready])
    }

    @Test func checkpointsNeedTheirTokenizerBesideThem() async throws {
        let room = try Room()
        let base = try await Phi3.load(Places.tiny)
        #expect(base.info.name == "tiny" && base.info.source == .checkpoint(Places.tiny))
        try await base.save(room["single.safetensors"])
        let refusal = await problem { _ = try await Phi3.load(room["single.safetensors"]) }
        #expect(refusal?.description.contains("tokenizer.json") == true)
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            _ = try room.copy(Places.tiny.appendingPathComponent(name), name)
        }
        let single = try await Phi3.load(room["single.safetensors"])
        #expect(single.info.fingerprint == base.info.fingerprint)
        let other = Places.phi3.appendingPathComponent("mini-4k/tokenizer.json")
        try FileManager.default.removeItem(at: room["tokenizer.json"])
        _ = try room.copy(other, "tokenizer.json")
        let mixed = await problem { _ = try await Phi3.load(room["single.safetensors"]) }
        #expect(mixed != nil)
    }

    @Test func alteredBundlesAreRefusedByTheNameOfTheFile() async throws {
        let room = try Room()
        let copy = try room.copy(Places.mini, "b.medphi")
        let weights = "model/Phi3.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        var data = try Data(contentsOf: copy.appendingPathComponent(weights))
        data[5000] ^= 1
        try data.write(to: copy.appendingPathComponent(weights))
        let refusal = await problem { _ = try await Phi3.load(copy) }
        guard case .checksumMismatch(let list) = refusal else {
            Issue.record("found \(String(describing: refusal))")
            return
        }
        #expect(list.problems == ["\(weights) is altered"])
    }

    @Test(arguments: [
        ("\"assistant\": 306", "\"assistant\": 305"),
        ("\"after_role\": \"\\n\"", "\"after_role\": \" \""),
    ])
    func manifestsThatDescribeAnotherTokenizerAreRefused(old: String, new: String) async throws {
        let room = try Room()
        let copy = try room.copy(Places.mini, "b.medphi")
        try change(copy.appendingPathComponent("metadata.json"), old, new)
        let refusal = await problem {
            _ = try await Phi3.load(copy, options: LoadOptions(verify: false))
        }
        #expect(refusal?.description.contains("another tokenizer") == true)
    }

    @Test(arguments: [
        ("\"heads\": 4", "\"heads\": 3", "do not go together"),
        ("\"rotary_dim\": 16", "\"rotary_dim\": 18", "rotary_dim is 18"),
        ("\"hidden_size\": 64", "\"hidden_size\": 32", "not what the manifest describes"),
        ("\"context_length\": 64", "\"context_length\": 128", "not what the manifest describes"),
        ("\"rank_slot\": 8", "\"rank_slot\": 16", "not what the manifest describes"),
        ("\"eps\": 1e-05", "\"eps\": 0", "eps is 0"),
    ])
    func manifestsThatDescribeNoSuchModelAreRefused(
        old: String, new: String, reason: String
    ) async throws {
        let room = try Room()
        let copy = try room.copy(Places.mini, "b.medphi")
        try change(copy.appendingPathComponent("metadata.json"), old, new)
        let options = LoadOptions(verify: false)
        let refusal = await problem {
            _ = try await Phi3.load(copy, backend: .reference, options: options)
        }
        #expect(refusal?.description.contains(reason) == true)
    }

    @Test func whatCoreMLCannotRunIsSaid() async throws {
        var substitute = LoadOptions()
        substitute.allowsSubstitute = true
        let checkpoint = await problem { [substitute] in
            _ = try await Phi3.load(Places.tiny, backend: .coreML, options: substitute)
        }
        #expect(checkpoint?.description.contains("Export a bundle") == true)
        #if !canImport(Darwin)
            let bundle = await problem {
                _ = try await Phi3.load(Places.mini, backend: .coreML)
            }
            #expect(bundle?.description.contains("an Apple device") == true)
        #endif
        var options = LoadOptions(context: 128)
        options.allowsSubstitute = true
        let (given, place) = (options, Places.mini)
        let other = await problem {
            _ = try await Phi3.load(place, backend: .coreML, options: given)
        }
        #expect(other?.description.contains("fixed in the package") == true)
    }

    @Test func aPlaceWithoutAModelIsAnError() async throws {
        let room = try Room()
        for url in [room["nothing"], room["nothing.medphi"], room["a.safetensors"], room.url] {
            #expect(await problem { _ = try await Phi3.load(url) } != nil)
        }
        let adapter = await problem { _ = try await Phi3.load(Places.notes) }
        #expect(adapter?.description.contains("metadata holds no 'config'") == true)
    }

    @Test func aModelThatDoesNotFitIsRefusedWithAWayOut() throws {
        let facts = try OpenedModel(Places.tiny, verify: false) { _, _ in }
            .backend(.reference, LoadOptions(memoryCheck: false)).facts
        func check(_ available: Int) -> MemoryCheck {
            .plan(facts, place: Places.tiny, context: 1024, available: available)
        }
        try check(1 << 40).requireFit()
        let weights = facts.memory.bytes(context: 0)
        #expect(throws: Phi3Error.self) { try check(weights).requireFit() }
        #expect(throws: Phi3Error.self) { try check(1000).requireFit() }
    }

    @Test func whatCannotBeLoadedHereIsSaidBeforeAnythingIsRead() async throws {
        let address = try #require(URL(string: "https://example.com/notes.medphi"))
        let remote = await problem { _ = try await Phi3.load(address) }
        #expect(remote?.description.contains("BundleStore") == true)
        #if os(Linux)
            let missing = URL(fileURLWithPath: "/no/such.medphi")
            let apple = await problem { _ = try await Phi3.load(missing, backend: .coreML) }
            #expect(apple?.description.contains("without Core ML") == true)
        #endif
    }

    @Test func loadingCanBeCancelled() async throws {
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            _ = try await Phi3.load(Places.mini)
        }
        await #expect(throws: CancellationError.self) { try await task.value }
    }
}

/// Events in the order they came.
final class Events: Sendable {
    private let list = Locked<[LoadEvent]>([])

    var all: [LoadEvent] { list.value }

    func add(_ event: LoadEvent) { list.change { $0.append(event) } }
}
