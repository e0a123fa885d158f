import Foundation

/// Bytes that a model needs, as computed from its shapes; not measured.
public struct MemoryNeeds: Sendable, Equatable {
    /// All weights.
    public var weights: Int
    /// Keys and values of one token.
    public var keyValuePerToken: Int
    /// Adapter slots, or an adapter beside the weights.
    public var adapters: Int
    /// Whether keys and values of the whole context are taken at once, as a package's states are.
    public var takesWholeContext: Bool

    /// Makes a sheet of needs.
    public init(
        weights: Int, keyValuePerToken: Int, adapters: Int = 0, takesWholeContext: Bool = false
    ) {
        self.weights = weights
        self.keyValuePerToken = keyValuePerToken
        self.adapters = adapters
        self.takesWholeContext = takesWholeContext
    }

    /// Bytes for a context of so many tokens.
    public func bytes(context: Int) -> Int {
        let cache = keyValuePerToken.multipliedReportingOverflow(by: max(0, context))
        var sum = cache.overflow ? Int.max : cache.partialValue
        for part in [weights, adapters] {
            let next = sum.addingReportingOverflow(max(0, part))
            sum = next.overflow ? Int.max : next.partialValue
        }
        return sum
    }
}

/// Whether a model fits into memory, and with which context.
public struct MemoryPlan: Sendable, Equatable {
    /// What can be done.
    public enum Verdict: Sendable, Equatable {
        /// It fits with the context that was asked for.
        case fits
        /// It fits with so many tokens of context only. A package's context is fixed when it is
        /// exported: export it with this one.
        case reduceContext(to: Int)
        /// Weights alone need more than there is.
        case refuse
    }

    /// Tokens of the context that was asked for.
    public let context: Int
    /// Bytes the model needs with it.
    public let needed: Int
    /// Bytes this process may still take; `nil`: the system does not say.
    public let available: Int?
    /// What can be done.
    public let verdict: Verdict

    /// Part of the free memory that stays free, for logits, buffers and the app itself: one eighth.
    static let reserveShare = 8
    /// Contexts are whole blocks of this many tokens.
    static let block = 64

    /// Compares needs with what there is.
    ///
    /// - Parameters:
    ///   - needs: what the model needs.
    ///   - context: tokens asked for.
    ///   - available: bytes this process may still take; `nil`: not known, and everything fits.
    public init(_ needs: MemoryNeeds, context: Int, available: Int?) {
        self.context = context
        self.available = available
        needed = needs.bytes(context: context)
        guard let available else {
            verdict = .fits
            return
        }
        let room = available - available / MemoryPlan.reserveShare
        if needed <= room {
            verdict = .fits
            return
        }
        let left = room - needs.bytes(context: 0)
        let tokens = needs.keyValuePerToken > 0 && left > 0 ? left / needs.keyValuePerToken : 0
        let whole = tokens / MemoryPlan.block * MemoryPlan.block
        verdict = whole > 0 ? .reduceContext(to: whole) : .refuse
    }
}
