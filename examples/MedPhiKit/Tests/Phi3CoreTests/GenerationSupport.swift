import Foundation
import Synchronization

@testable import Phi3Core

/// Where a test stops a backend, to do something just then.
final class Gate: Sendable {
    private let (arrivals, arrived) = AsyncStream.makeStream(of: Void.self)
    private let (openings, opened) = AsyncStream.makeStream(of: Void.self)

    /// Waits until the backend stands here.
    func reached() async { for await _ in arrivals {} }

    /// Lets the backend go on.
    func open() { opened.finish() }

    /// Stands here until it is opened or the task is cancelled.
    func pass() async throws {
        arrived.finish()
        for await _ in openings {}
        try Task.checkCancellation()
    }
}

/// A backend that says what a test wrote down, and remembers how it was called.
final class ScriptedBackend: TokenBackend {
    struct Call: Equatable {
        var ids: [Int32]
        var adapter: AdapterID?
    }

    struct Record {
        var calls: [Call] = []
        var running = 0
        var overlaps = 0
        var loads = 0
        var unloads = 0
        var failures: [any Error] = []
        var loadFailures: [any Error] = []
        var saved: [URL] = []
        /// By the number of the call, from 1.
        var gates: [Int: Gate] = [:]
    }

    let facts: BackendFacts
    let record = Mutex(Record())
    private let pause: Duration
    /// The next id, given all ids so far.
    private let next: @Sendable ([Int32], AdapterID?) -> Int32

    init(
        context: Int = 64, rows: Int = 1152, pause: Duration = .zero,
        support: BackendFacts.AdapterSupport = .any,
        next: @escaping @Sendable ([Int32], AdapterID?) -> Int32
    ) throws {
        facts = BackendFacts(
            name: "script", contextLength: context, vocabularyRows: rows, adapterSupport: support,
            target: try Small.target(),
            memory: MemoryNeeds(weights: 1000, keyValuePerToken: 10))
        self.pause = pause
        self.next = next
    }

    func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws {
        report(.loading)
        let failure = record.withLock { record -> (any Error)? in
            record.loads += 1
            return record.loadFailures.isEmpty ? nil : record.loadFailures.removeFirst()
        }
        if let failure { throw failure }
    }

    func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] {
        let (failure, gate) = record.withLock { record -> ((any Error)?, Gate?) in
            record.calls.append(Call(ids: ids, adapter: adapter?.id))
            record.running += 1
            if record.running > 1 { record.overlaps += 1 }
            let failure = record.failures.isEmpty ? nil : record.failures.removeFirst()
            return (failure, record.gates[record.calls.count])
        }
        defer { record.withLock { $0.running -= 1 } }
        if let failure { throw failure }
        try await gate?.pass()
        if pause > .zero { try await Task.sleep(for: pause) } else { await Task.yield() }
        var logits = [Float](repeating: 0, count: facts.vocabularyRows)
        logits[Int(next(ids, adapter?.id))] = 9
        return logits
    }

    /// Makes a call stop until the gate is opened.
    func gate(at call: Int) -> Gate {
        let gate = Gate()
        record.withLock { $0.gates[call] = gate }
        return gate
    }

    func unload() async { record.withLock { $0.unloads += 1 } }

    func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {
        record.withLock { $0.saved.append(url) }
    }
}

/// Models for tests of the loop.
enum Scripts {
    static let tokenizer = Result { try Tokenizer.load(directory: Vectors.tiny) }

    static func model(_ backend: ScriptedBackend) throws -> Phi3 {
        try Phi3(
            backend: backend, tokenizer: tokenizer.get(),
            info: ModelInfo(
                name: "script", source: .checkpoint(Small.base),
                fingerprint: backend.facts.target.fingerprint, byteCount: 0))
    }

    /// A model that answers each prompt with a text and ends it.
    static func saying(
        _ text: String, prompt: [Int32], context: Int = 64, pause: Duration = .zero
    ) throws -> (model: Phi3, backend: ScriptedBackend) {
        let tokenizer = try tokenizer.get()
        let answer = tokenizer.encode(text) + [tokenizer.endID]
        let count = prompt.count
        let backend = try ScriptedBackend(context: context, pause: pause) { ids, _ in
            answer[max(0, min(ids.count - count, answer.count - 1))]
        }
        return (try model(backend), backend)
    }
}
