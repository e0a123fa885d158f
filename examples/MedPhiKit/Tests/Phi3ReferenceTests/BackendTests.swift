import Foundation
import Phi3Core
import Synchronization
import Testing

@testable import Phi3Reference

/// The processor as a backend.
@Suite struct BackendTests {
    private let ids: [Int32] = [315, 259, 71, 274, 262, 279]

    private func mini() throws -> ReferenceBackend {
        try ReferenceBackend(try Checkpoint.open(Fixtures.phi3.appendingPathComponent("mini-4k")))
    }

    @Test func itGivesTheModelsLogitsWhateverWasReadBefore() async throws {
        let backend = try mini()
        let model = try ReferenceModel.load(Fixtures.phi3.appendingPathComponent("mini-4k"))
        for count in [3, 6, 2, 5] {
            let sequence = Array(ids.prefix(count))
            let all = try model.logits(sequence)
            let found = try await backend.logits(after: sequence, adapter: nil)
            let last = Array(all.suffix(model.config.vocabSize))
            #expect(largestDifference(found, last) < 1e-5)
        }
    }

    @Test func itIsAsLongAsItWasAskedFor() async throws {
        let checkpoint = try Checkpoint.open(Fixtures.tiny)
        let backend = try ReferenceBackend(checkpoint, context: 4)
        #expect(backend.facts.contextLength == 4)
        #expect(try ReferenceBackend(checkpoint, context: 9999).facts.contextLength == 1024)
        await #expect(throws: Phi3Error.self) { try await backend.logits(after: ids, adapter: nil) }
        #expect(throws: Phi3Error.self) { _ = try ReferenceBackend(checkpoint, context: 0) }
    }

    @Test func itLoadsAgainAfterUnloading() async throws {
        let backend = try mini()
        let events = Recorded()
        try await backend.load { events.add($0) }
        try await backend.load { events.add($0) }
        let before = try await backend.logits(after: ids, adapter: nil)
        await backend.unload()
        try await backend.load { events.add($0) }
        #expect(try await backend.logits(after: ids, adapter: nil) == before)
        #expect(events.all == [.loading, .loading])
    }

    @Test func aCancelledTaskStopsBetweenBlocks() async throws {
        let backend = try ReferenceBackend(try Checkpoint.open(Fixtures.tiny))
        let ids = [Int32](repeating: 5, count: 600)
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            _ = try await backend.logits(after: ids, adapter: nil)
        }
        await #expect(throws: CancellationError.self) { try await task.value }
        // What was read until then is no trap for the next one.
        let few = try await backend.logits(after: Array(ids.prefix(2)), adapter: nil)
        #expect(!few.contains { !$0.isFinite })
    }

    @Test func itNeedsWhatItsShapesNeed() throws {
        let facts = try ReferenceBackend(try Checkpoint.open(Fixtures.tiny)).facts
        #expect(facts.memory.keyValuePerToken == 2 * 4 * 192 * 4)
        let packed = try ReferenceBackend(
            try Checkpoint.open(Fixtures.tiny), options: .init(expandedBytes: 0)
        ).facts
        #expect(packed.memory.weights == packed.checkpoint?.byteCount)
        #expect(facts.memory.weights > packed.memory.weights)
    }

    @Test func anAdapterOfAPackageIsNoneOfACheckpoint() async throws {
        let bound = BoundAdapter(
            id: AdapterID(name: "x", sha256: ""), adapter: nil, functions: ["decode": "decode_x"])
        let backend = try mini()
        await #expect(throws: Phi3Error.self) {
            try await backend.logits(after: ids, adapter: bound)
        }
    }

    private final class Recorded: Sendable {
        private let events = Mutex<[LoadEvent]>([])

        var all: [LoadEvent] { events.withLock { $0 } }

        func add(_ event: LoadEvent) { events.withLock { $0.append(event) } }
    }
}
