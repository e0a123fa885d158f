import Foundation

/// What a comparison of a backend with MLX found.
public struct ParityReport: Sendable, Equatable {
    /// One prompt under one adapter.
    public struct Case: Sendable, Equatable {
        /// Prompt and adapter.
        public let name: String
        /// "note": an ordinary prompt; "edge": one that fills the context.
        public let prompt: String
        /// `nil`: the base.
        public let adapter: String?
        /// Rows of logits that were compared.
        public let rows: Int
        /// The largest difference of a logit.
        public let largestDifference: Double
        /// The same as a share of the row's largest logit.
        public let error: Double
        /// Mean KL(MLX ‖ backend), in nats.
        public let kl: Double
        /// Share of rows in which MLX's first token has the highest logit.
        public let sameFirst: Double
        /// The same among rows in which MLX's lead is beyond the limit; 1 where there is none.
        public let decided: Double
        /// Whether the prompt goes on with MLX's tokens; `nil` where nothing is continued.
        public let greedy: Bool?
        /// What is beyond its limit, a line each.
        public let findings: [String]
    }

    /// What computed: "reference" or "core-ml".
    public let backend: String
    /// Each prompt under each adapter.
    public let cases: [Case]
    /// The largest difference between reading a prompt at once and token by token, as a share of the
    /// largest logit.
    public let prefillDecode: Double
    /// Whether adapters put on, taken off and put on again give the same logits bit for bit; `nil`
    /// without adapters.
    public let swaps: Bool?
    /// What is wrong, a line each; empty where everything is within its limit.
    public let findings: [String]

    /// Whether everything is within its limit.
    public var passed: Bool { findings.isEmpty }

    /// The report as JSON, with the names that the Python package's has.
    public var json: JSONValue {
        [
            "cases": .array(cases.map(\.json)),
            "prefill_decode": ParityReport.number(prefillDecode),
            "late": .null, "swaps": swaps.map { .bool($0) } ?? .null, "hidden": .array([]),
            "peak": .null, "findings": .array(findings.map { .string($0) }),
        ]
    }

    /// JSON has no number that is none, as a broken backend's figures are.
    fileprivate static func number(_ value: Double) -> JSONValue {
        value.isFinite ? .number(value) : .null
    }
}

extension ParityReport.Case {
    fileprivate var json: JSONValue {
        [
            "name": .string(name), "prompt": .string(prompt),
            "adapter": adapter.map { .string($0) } ?? .null, "rows": .integer(rows),
            "max_abs": ParityReport.number(largestDifference), "error": ParityReport.number(error),
            "kl": ParityReport.number(kl), "top1": ParityReport.number(sameFirst),
            "decided": ParityReport.number(decided), "greedy": greedy.map { .bool($0) } ?? .null,
        ]
    }

    /// Compares a backend's logits with MLX's, row by row.
    ///
    /// - Parameters:
    ///   - golden: the case.
    ///   - found: index in `golden.rows` -> the backend's logits.
    init(_ golden: GoldenLogits.Case, _ found: [(at: Int, logits: [Float])]) {
        var (apart, error, kl) = (0.0, 0.0, 0.0)
        var (same, sure, agreed) = (0, 0, 0)
        var continued = true
        for (at, logits) in found {
            let row = RowDifference(golden.row(at), logits.map(Double.init))
            apart = RowDifference.worse(apart, row.apart)
            error = RowDifference.worse(error, row.apart / row.largest)
            kl += row.kl
            if row.isSame { same += 1 }
            if row.lead > golden.limits.margin * row.largest {
                sure += 1
                if row.isSame { agreed += 1 }
            }
            if golden.rows[at] >= golden.ids.count - 1, !row.isSame { continued = false }
        }
        func share(_ part: Int, _ whole: Int) -> Double {
            whole == 0 ? 1 : Double(part) / Double(whole)
        }
        name = golden.name
        prompt = golden.prompt
        adapter = golden.adapter
        rows = found.count
        largestDifference = apart
        self.error = error
        self.kl = found.isEmpty ? 0 : kl / Double(found.count)
        sameFirst = share(same, found.count)
        decided = share(agreed, sure)
        // Each token is right given the ones before it, so the whole continuation is.
        greedy = golden.continuation.isEmpty ? nil : continued
        findings = Self.findings(golden, error: error, kl: self.kl, decided: decided)
    }

    private static func findings(
        _ golden: GoldenLogits.Case, error: Double, kl: Double, decided: Double
    ) -> [String] {
        let limits = golden.limits
        var lines: [String] = []
        // A figure that is no number is beyond every limit.
        if !(error <= limits.error) {
            lines.append(
                "a logit is off by \(percent(error)) of the largest (at most "
                    + "\(percent(limits.error)))")
        }
        if !(kl <= limits.kl) {
            lines.append("KL \(String(format: "%.2g", kl)) nats (at most \(limits.kl))")
        }
        if decided != 1 {
            lines.append("another first token in \(percent(1 - decided)) of the decided rows")
        }
        return lines.map { "\(printable(golden.name)): \($0)" }
    }
}

/// A share as people read it.
func percent(_ share: Double) -> String { String(format: "%.2f%%", share * 100) }

/// Two rows of logits, MLX's first.
struct RowDifference {
    /// The largest difference of a logit.
    let apart: Double
    /// MLX's largest logit, at least 1.
    let largest: Double
    /// KL(MLX ‖ other) in nats.
    let kl: Double
    /// Whether MLX's first token has the other's highest logit; float16 logits may tie.
    let isSame: Bool
    /// MLX's lead of its first token.
    let lead: Double

    init(_ wanted: [Double], _ found: [Double]) {
        var (apart, largest) = (0.0, 1.0)
        var (first, second, best) = (-Double.infinity, -Double.infinity, 0)
        for (at, (left, right)) in zip(wanted, found).enumerated() {
            apart = RowDifference.worse(apart, abs(left - right))
            largest = max(largest, abs(left))
            if left > first {
                (first, second, best) = (left, first, at)
            } else if left > second {
                second = left
            }
        }
        let (ours, theirs) = (logSum(wanted), logSum(found))
        var kl = 0.0
        for (left, right) in zip(wanted, found) {
            kl += exp(left - ours) * ((left - ours) - (right - theirs))
        }
        self.apart = apart
        self.largest = largest
        self.kl = kl
        isSame = best < found.count && found[best] == found.max()
        lead = first - second
    }

    /// The larger of two; what is no number stays that.
    static func worse(_ left: Double, _ right: Double) -> Double {
        left.isNaN || right.isNaN ? .nan : max(left, right)
    }
}

/// log(Σ exp(x)).
private func logSum(_ row: [Double]) -> Double {
    let largest = row.max() ?? 0
    return largest + log(row.reduce(0) { $0 + exp($1 - largest) })
}
