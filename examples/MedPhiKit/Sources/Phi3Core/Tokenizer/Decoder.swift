/// Text of ids that arrive one by one, in constant time for each.
///
/// Single bytes wait for the next id that is none, because together they are a character only then;
/// a line break is such a byte, so it comes one id late. The joined results of `step`, then
/// `flush`, are `Tokenizer.decode` of the same ids.
public struct StreamingDecoder: Sendable {
    private let vocabulary: Vocabulary
    private let skipped: Set<Int32>
    private var waiting: [UInt8] = []
    private var hasBegun = false

    init(_ vocabulary: Vocabulary, skipping skipped: Set<Int32>) {
        self.vocabulary = vocabulary
        self.skipped = skipped
    }

    /// The text that is finished by an id, often empty. Ids that the tokenizer does not know, as
    /// those of a padded vocabulary, give nothing.
    public mutating func step(_ id: Int32) -> String {
        var out: [UInt8] = []
        step(id, into: &out)
        return String(decoding: out, as: UTF8.self)
    }

    /// What waits at the end: bytes of a character, as U+FFFD where it never got its last.
    public mutating func flush() -> String {
        var out: [UInt8] = []
        flush(into: &out)
        return String(decoding: out, as: UTF8.self)
    }

    mutating func step(_ id: Int32, into out: inout [UInt8]) {
        guard vocabulary.contains(id), !skipped.contains(id) else { return }
        let byte = vocabulary.byteValues[Int(id)]
        if byte >= 0 {
            waiting.append(UInt8(byte))
            return
        }
        flush(into: &out)
        append(vocabulary.decoded[Int(id)], to: &out)
    }

    mutating func flush(into out: inout [UInt8]) {
        if waiting.isEmpty { return }
        if String(validating: waiting, as: UTF8.self) != nil {
            append(waiting, to: &out)
        } else {
            // One for each byte of the whole run, the good ones among them too: as the reference.
            for _ in waiting { append([0xEF, 0xBF, 0xBD], to: &out) }
        }
        waiting.removeAll(keepingCapacity: true)
    }

    /// Appends, less the one space that the whole text may begin with.
    private mutating func append(_ text: [UInt8], to out: inout [UInt8]) {
        out += hasBegun || text.first != 0x20 ? text[...] : text.dropFirst()
        hasBegun = hasBegun || !text.isEmpty
    }
}
