import Foundation
import Synchronization

/// What a test asks of this module for one package, and what it learns from it.
public final class TestBench: Sendable {
    /// One prediction that was asked for.
    public struct Call: Sendable, Equatable {
        /// The function.
        public let function: String
        /// The slot of the first id.
        public let position: Int
        /// Ids that one call reads.
        public let width: Int
        /// The row whose logits are wanted.
        public let lastIndex: Int
        /// The row of the rotary tables; `nil` without that input.
        public let ropeRow: Int?
    }

    /// What goes wrong on purpose, and how long things take.
    public struct Faults: Sendable {
        /// Whether compiling fails.
        public var compileFails = false
        /// Units that refuse to load.
        public var refusedUnits: Set<Int> = []
        /// Functions that fail to load.
        public var refusedFunctions: Set<String> = []
        /// Predictions that work before the next one fails, once; `nil`: none fails.
        public var predictionsUntilFailure: Int?
        /// Microseconds that a prediction takes beside its computing.
        public var predictionDelay: UInt32 = 0
        /// Nanoseconds that compiling takes.
        public var compileDelay: UInt64 = 0
        /// Waited for before anything is compiled.
        public var onCompilation: (@Sendable () async -> Void)?
        /// Called before each prediction computes.
        public var onPrediction: (@Sendable (Call) -> Void)?
    }

    private struct Contents: Sendable {
        var faults = Faults()
        var calls: [Call] = []
        var loads: [String] = []
        var compilations = 0
        var notes: [String] = []
    }

    private let contents = Mutex(Contents())
    private static let all = Mutex<[String: TestBench]>([:])

    /// The bench of a package, wherever its compiled form lies.
    public static func of(package: URL) -> TestBench {
        let path = package.standardizedFileURL.path
        return all.withLock { all in
            if let bench = all[path] { return bench }
            let bench = TestBench()
            all[path] = bench
            return bench
        }
    }

    /// What goes wrong.
    public var faults: Faults {
        get { contents.withLock { $0.faults } }
        set { contents.withLock { $0.faults = newValue } }
    }
    /// Predictions so far.
    public var calls: [Call] { contents.withLock { $0.calls } }
    /// Functions that were loaded, or tried.
    public var loads: [String] { contents.withLock { $0.loads } }
    /// Packages that were compiled.
    public var compilations: Int { contents.withLock { $0.compilations } }
    /// What Apple's module would not have told.
    public var notes: [String] { contents.withLock { $0.notes } }

    /// Forgets calls and loads.
    public func clear() {
        contents.withLock {
            $0.calls = []
            $0.loads = []
        }
    }

    func note(_ text: String) { contents.withLock { $0.notes.append(text) } }

    func willCompile() async throws {
        let faults = contents.withLock { contents in
            contents.compilations += 1
            return contents.faults
        }
        await faults.onCompilation?()
        if faults.compileDelay > 0 { try await Task.sleep(nanoseconds: faults.compileDelay) }
        if faults.compileFails { throw failure(3, "compiling fails on purpose") }
    }

    func willLoad(function: String, units: MLComputeUnits) throws {
        let faults = contents.withLock { contents in
            contents.loads.append(function)
            return contents.faults
        }
        if faults.refusedUnits.contains(units.rawValue) {
            throw failure(-14, "these units fail on purpose")
        }
        if faults.refusedFunctions.contains(function) {
            throw failure(-14, "this function fails on purpose")
        }
    }

    func willPredict(_ call: Call) throws {
        let (fails, faults) = contents.withLock { contents in
            contents.calls.append(call)
            let faults = contents.faults
            guard let left = faults.predictionsUntilFailure else { return (false, faults) }
            contents.faults.predictionsUntilFailure = left > 0 ? left - 1 : nil
            return (left == 0, faults)
        }
        faults.onPrediction?(call)
        if faults.predictionDelay > 0 { usleep(faults.predictionDelay) }
        if fails { throw failure(-14, "a prediction fails on purpose") }
    }
}
