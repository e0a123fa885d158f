/// The entries of a tokenizer and what each of them is as text.
///
/// Entries are keyed by their UTF-8 bytes: as Swift `String`s, six pairs of Phi-3's entries are
/// equal (U+03AC and U+1F71, for one).
struct Vocabulary: Sendable {
    /// Text of each entry, `▁` for a space; the place is the id.
    let entries: [[UInt8]]
    /// The value of an entry that stands for a single byte, else -1.
    let byteValues: [Int16]
    /// What an entry decodes to, before bytes are joined to characters.
    let decoded: [[UInt8]]

    private let ids: [[UInt8]: Int32]

    /// Takes entries in the order of their ids; nil when one of them comes twice.
    init?(entries: [[UInt8]]) {
        var ids: [[UInt8]: Int32] = [:]
        ids.reserveCapacity(entries.count)
        for (id, entry) in entries.enumerated() {
            guard ids.updateValue(Int32(id), forKey: entry) == nil else { return nil }
        }
        self.ids = ids
        self.entries = entries
        byteValues = entries.map { Vocabulary.byteValue(of: $0) ?? -1 }
        decoded = entries.map(Vocabulary.withSpaces)
    }

    var count: Int { entries.count }

    subscript(entry: [UInt8]) -> Int32? { ids[entry] }

    func contains(_ id: Int32) -> Bool { entries.indices.contains(Int(id)) }

    /// `▁` (U+2581) in UTF-8.
    static let spaceMark: [UInt8] = [0xE2, 0x96, 0x81]

    /// The entry of a single byte, as `<0x0A>`.
    static func byteEntry(_ byte: UInt8) -> [UInt8] {
        let digits = Array("0123456789ABCDEF".utf8)
        let pair = [digits[Int(byte >> 4)], digits[Int(byte & 15)]]
        return Array("<0x".utf8) + pair + Array(">".utf8)
    }

    /// The byte that an entry stands for; as lenient with the digits as the reference.
    private static func byteValue(of entry: [UInt8]) -> Int16? {
        guard entry.count == 6, entry.starts(with: "<0x".utf8), entry[5] == UInt8(ascii: ">"),
            let value = UInt8(String(decoding: entry[3..<5], as: UTF8.self), radix: 16)
        else { return nil }
        return Int16(value)
    }

    private static func withSpaces(_ entry: [UInt8]) -> [UInt8] {
        var out: [UInt8] = []
        var at = 0
        while at < entry.count {
            if entry[at...].starts(with: spaceMark) {
                out.append(0x20)
                at += spaceMark.count
            } else {
                out.append(entry[at])
                at += 1
            }
        }
        return out
    }
}
