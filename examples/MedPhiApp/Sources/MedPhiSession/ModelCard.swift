import MedPhiKit

/// What the screen says of the model that is open.
public struct ModelCard: Sendable, Equatable {
    /// A line of the card.
    public struct Row: Sendable, Equatable, Identifiable {
        /// What it is about; no two rows have the same.
        public let title: String
        /// What it says.
        public let value: String

        /// The title.
        public var id: String { title }
    }

    /// What people call the model.
    public let name: String
    /// Sizes, context, terms, and how far it was verified.
    public let rows: [Row]
    /// What speaks against using it on this device; `nil`: nothing.
    public let warning: String?

    /// Reads the card off a model.
    public init(_ model: Phi3, available: Int? = SystemMemory.available()) {
        let (info, plan) = (model.info, model.plan(available: available))
        name = info.name
        var rows = [
            Row(title: "Size on disk", value: Wording.size(info.byteCount)),
            Row(title: "Memory, computed", value: Wording.size(plan.needed)),
            Row(title: "Context", value: Wording.count(model.contextLength, "token")),
            Row(title: "Runs on", value: ModelCard.backend(model.backendName)),
        ]
        if let level = info.verification {
            rows.append(Row(title: "Verified", value: ModelCard.verified(level)))
        }
        rows.append(Row(title: "Terms", value: info.licence ?? "not stated"))
        self.rows = rows
        warning = ModelCard.warning(plan)
    }

    private static func backend(_ name: String) -> String {
        switch name {
        case "core-ml": "Core ML"
        case "reference": "the processor"
        default: name
        }
    }

    private static func verified(_ level: Manifest.Verification.Level) -> String {
        switch level {
        case .none: "not at all"
        case .spec: "its files and program, part by part; it was not run"
        case .graph: "its program was run on another machine and compared with the original"
        case .predict: "it was run by Core ML and compared with the original"
        }
    }

    private static func warning(_ plan: MemoryPlan) -> String? {
        switch plan.verdict {
        case .fits: nil
        case .reduceContext(let tokens):
            "It needs more memory than is free. Export it with a context of \(tokens) tokens."
        case .refuse:
            "It needs \(Wording.size(plan.needed)) of memory, and "
                + "\(Wording.size(plan.available ?? 0)) are free. Close other apps, or export it "
                + "with fewer bits."
        }
    }
}

/// Figures of a note that was written.
public struct NoteFigures: Sendable, Equatable {
    /// What they say, one line.
    public let line: String
    /// Why the note is cut off; `nil`: it is not.
    public let ending: String?

    /// Reads the figures off a completion.
    public init(_ completion: Completion) {
        let timings = completion.timings
        var parts = [
            "\(Wording.count(completion.promptTokens, "token")) read in "
                + Wording.seconds(timings.prefill),
            "first word after \(Wording.seconds(timings.timeToFirstToken))",
            "\(Wording.count(completion.ids.count, "token")) written",
        ]
        if timings.decodeTokensPerSecond > 0 {
            parts[2] += ", \(Wording.decimals(timings.decodeTokensPerSecond, 1)) a second"
        }
        if let peak = timings.peakBytes { parts.append("\(Wording.size(peak)) of memory at most") }
        line = parts.joined(separator: "; ")
        ending = Wording.ending(completion.stopReason)
    }
}
