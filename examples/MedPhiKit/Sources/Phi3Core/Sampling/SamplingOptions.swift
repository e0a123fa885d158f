/// How the next token is chosen.
///
/// The defaults take the most likely token each time. The names and ranges are those of the Python
/// package's `GenerateConfig`; `topK` is this package's own.
public struct SamplingOptions: Sendable, Equatable, Codable {
    /// 0 takes the most likely token each time (greedy); at most 10.
    public var temperature: Double
    /// Keep only so many of the likeliest tokens, and those equal to the last of them; 0 keeps all.
    public var topK: Int
    /// Keep the smallest set of tokens that holds this probability; 1 keeps all.
    public var topP: Double
    /// Drop tokens less likely than this share of the most likely one; 0 keeps all.
    public var minP: Double
    /// Divide the logits of recent tokens by this, 1 to 10; 1 changes nothing.
    public var repetitionPenalty: Double
    /// Start of the random numbers when the temperature is above 0.
    public var seed: UInt64

    /// Makes options; `validate()` says whether they are in range.
    public init(
        temperature: Double = 0, topK: Int = 0, topP: Double = 1, minP: Double = 0,
        repetitionPenalty: Double = 1, seed: UInt64 = 0
    ) {
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.minP = minP
        self.repetitionPenalty = repetitionPenalty
        self.seed = seed
    }

    /// - Throws: `Phi3Error.option` for the first value outside its range.
    public func validate() throws(Phi3Error) {
        try SamplingOptions.check("temperature", temperature, 0...10)
        try SamplingOptions.check("topP", topP, 1e-6...1)
        try SamplingOptions.check("minP", minP, 0...1)
        try SamplingOptions.check("repetitionPenalty", repetitionPenalty, 1...10)
        if topK < 0 { throw SamplingOptions.wrong("topK", "\(topK)", "0 or more") }
        if seed > UInt64(Int64.max) {
            throw SamplingOptions.wrong("seed", "\(seed)", "at most \(Int64.max)")
        }
    }

    private static func check(
        _ name: String, _ value: Double, _ range: ClosedRange<Double>
    ) throws(Phi3Error) {
        if !range.contains(value) {
            throw wrong(name, "\(value)", "\(range.lowerBound) to \(range.upperBound)")
        }
    }

    private static func wrong(_ name: String, _ found: String, _ expected: String) -> Phi3Error {
        .option(
            ErrorDetails(
                place: name, found: found, expected: expected, advice: "Choose a value in range."))
    }
}
