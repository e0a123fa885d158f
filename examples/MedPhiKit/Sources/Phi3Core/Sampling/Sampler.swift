import Foundation

/// Which token comes next: the most likely, or one drawn.
///
/// The order is transformers': repetition penalty, temperature, top-k, top-p, min-p. A draw is a
/// function of the options' seed and of the number of the token, so a sampler keeps no state, and
/// one seed gives the tokens that the Python package gives for the same logits.
public struct Sampler: Sendable {
    /// How tokens are chosen.
    public let options: SamplingOptions
    /// Ids that are never chosen, as the rows of a padded vocabulary.
    public let suppressed: [ClosedRange<Int32>]

    /// Tokens of the note that count as recent. The conversation does not count: names and doses
    /// are there to be repeated.
    public static let recent = 64

    /// - Parameters:
    ///   - options: how to choose.
    ///   - suppressed: ids that are never chosen; ids beyond the logits are no error.
    /// - Throws: `Phi3Error.option` for options outside their range.
    public init(
        _ options: SamplingOptions = .init(), suppressing suppressed: [ClosedRange<Int32>] = []
    ) throws(Phi3Error) {
        try options.validate()
        self.options = options
        self.suppressed = suppressed
    }

    /// The id that follows.
    ///
    /// - Parameters:
    ///   - logits: one for each row of the model's embedding, after the last token.
    ///   - written: the ids of the note so far, without the prompt; their number picks the random
    ///     key.
    /// - Throws: `Phi3Error.generation` for logits that are not numbers, or with no id to choose.
    public func next(logits: [Float], written: [Int32]) throws(Phi3Error) -> Int32 {
        if let place = logits.firstIndex(where: { !$0.isFinite }) {
            throw Sampler.problem(
                "the logit of id \(place) is not a finite number",
                "Its weights are damaged, or float16 is too narrow for them.")
        }
        var scores = adjusted(logits, written: written)
        if Float(options.temperature) > 0 {
            let key = RandomBits.key(seed: options.seed, number: written.count)
            scores = Sampler.withNoise(scores, key: key)
        }
        guard let best = Sampler.firstLargest(scores), scores[best] > -.infinity else {
            throw Sampler.problem(
                "no id is left to choose from \(counted(logits.count, "logit"))",
                "Suppress fewer ids.")
        }
        return Int32(best)
    }

    /// Logits after suppression, penalty, temperature and cuts; what is cut is -infinity.
    public func adjusted(_ logits: [Float], written: [Int32]) -> [Float] {
        var scores = logits
        for range in suppressed {
            let low = max(0, Int(range.lowerBound))
            let high = min(scores.count, Int(range.upperBound) + 1)
            if low < high { for id in low..<high { scores[id] = -.infinity } }
        }
        let penalty = Float(options.repetitionPenalty)
        if options.repetitionPenalty != 1 {
            for id in Set(written.suffix(Sampler.recent)) where scores.indices.contains(Int(id)) {
                let held = scores[Int(id)]
                scores[Int(id)] = held < 0 ? held * penalty : held / penalty
            }
        }
        let temperature = Float(options.temperature)
        guard temperature > 0 else { return scores }
        for id in scores.indices { scores[id] /= temperature }
        if options.topK > 0 { Sampler.cutTopK(&scores, options.topK) }
        if options.topP < 1 { Sampler.cutTopP(&scores, Float(options.topP)) }
        if options.minP > 0 { Sampler.cutMinP(&scores, Float(options.minP)) }
        return scores
    }

    /// Scores with Gumbel noise: the largest of them is a draw by the softmax of the scores.
    private static func withNoise(_ scores: [Float], key: (UInt32, UInt32)) -> [Float] {
        var out = scores
        RandomBits.forEach(count: scores.count, key: key) { id, word in
            if scores[id] == -.infinity { return }
            out[id] = -log(-log(RandomBits.uniform(word))) + scores[id]
        }
        return out
    }

    private static func firstLargest(_ scores: [Float]) -> Int? {
        guard var best = scores.indices.first else { return nil }
        for id in scores.indices where scores[id] > scores[best] { best = id }
        return best
    }

    private static func problem(_ found: String, _ advice: String) -> Phi3Error {
        .generation(
            ErrorDetails(
                place: "the model's logits", found: found, expected: "a finite number for each id",
                advice: advice))
    }
}
