import Foundation
import MedPhiKit
import Synchronization

/// A backend that writes down a text from the demo's tokenizer, at the pace of a test.
final class ScriptedBackend: TokenBackend {
    let facts: BackendFacts
    let unloads = Mutex(0)
    private let answer: [Int32]
    /// The id that every prompt ends with, and no answer holds.
    private let asks: Int32
    /// Lets one token out each; `nil`: all of them.
    private let gate: Gate?
    private let failure: Phi3Error?
    private let promptCount = Mutex(0)

    init(
        _ answer: [Int32], after asks: Int32, rows: Int, target: AdapterTarget, context: Int,
        gate: Gate?,
        failure: Phi3Error?
    ) {
        facts = BackendFacts(
            name: "reference", contextLength: context, vocabularyRows: rows, adapterSupport: .any,
            target: target, memory: MemoryNeeds(weights: 4_000_000, keyValuePerToken: 3072))
        (self.answer, self.asks, self.gate, self.failure) = (answer, asks, gate, failure)
    }

    func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws {}

    func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] {
        if let failure { throw failure }
        await gate?.pass()
        let written = promptCount.withLock { count in
            if ids.last == asks { count = ids.count }
            return ids.count - count
        }
        var logits = [Float](repeating: 0, count: facts.vocabularyRows)
        logits[Int(answer[min(written, answer.count - 1)])] = 9
        return logits
    }

    func unload() async { unloads.withLock { $0 += 1 } }

    func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {}
}

/// Lets as many through as a test says.
actor Gate {
    private var open = 0
    private var waiting: [CheckedContinuation<Void, Never>] = []
    private(set) var passed = 0

    func pass() async {
        if open > 0 { open -= 1 } else { await withCheckedContinuation { waiting.append($0) } }
        passed += 1
    }

    func open(_ count: Int) {
        for _ in 0..<count {
            if waiting.isEmpty { open += 1 } else { waiting.removeFirst().resume() }
        }
    }
}

/// Models without weights, with the demo's tokenizer.
enum Scripts {
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    static let tiny = root.appendingPathComponent("mlx_medphi/assets/tiny")
    private static let tokenizer = Result { try Tokenizer.load(directory: tiny) }
    private static let target = Result {
        let checkpoint = try Checkpoint.open(tiny)
        return AdapterTarget(checkpoint, fingerprint: Fingerprint(of: checkpoint))
    }
    static let conversation =
        "Dr: Any fever?\nPatient: No, but I have had an earache for four days."

    static func backend(
        saying text: String, context: Int = 512, gate: Gate? = nil, failure: Phi3Error? = nil
    ) throws -> ScriptedBackend {
        let tokenizer = try tokenizer.get()
        return try ScriptedBackend(
            tokenizer.encode(text) + [tokenizer.endID], after: tokenizer.assistantID,
            rows: 1152, target: target.get(), context: context, gate: gate, failure: failure)
    }

    static func model(_ backend: ScriptedBackend, adapters: [String] = []) throws -> Phi3 {
        try Phi3(
            backend: backend, tokenizer: tokenizer.get(),
            info: ModelInfo(
                name: "script", source: .checkpoint(tiny),
                fingerprint: backend.facts.target.fingerprint, byteCount: 3_984_768,
                verification: .graph, adapters: adapters))
    }
}
