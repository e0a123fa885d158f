/// A token that is whole in the text, beside the vocabulary: `<|end|>`, `</s>`, `<|user|>`.
struct AddedToken: Sendable, Equatable {
    let id: Int32
    /// UTF-8.
    let content: [UInt8]
    /// Whether it swallows white space behind it.
    let stripsRight: Bool
}

/// The added tokens of a tokenizer, and where they stand in a text.
struct AddedTokens: Sendable {
    let tokens: [AddedToken]
    let ids: Set<Int32>
    private let byContent: [[UInt8]: AddedToken]
    /// By their first byte, the longest first.
    private let byFirstByte: [UInt8: [AddedToken]]

    /// Takes tokens whose contents and ids are different and not empty.
    init(_ tokens: [AddedToken]) {
        self.tokens = tokens
        ids = Set(tokens.map(\.id))
        byContent = Dictionary(tokens.map { ($0.content, $0) }) { first, _ in first }
        byFirstByte = Dictionary(grouping: tokens.filter { !$0.content.isEmpty }) { $0.content[0] }
            .mapValues { $0.sorted { $0.content.count > $1.content.count } }
    }

    subscript(content: String) -> AddedToken? { byContent[Array(content.utf8)] }

    /// The longest token that stands at a place of a text.
    func token(in text: UnsafeBufferPointer<UInt8>, at place: Int) -> AddedToken? {
        byFirstByte[text[place]]?.first { token in
            text.count - place >= token.content.count
                && text[place..<place + token.content.count].elementsEqual(token.content)
        }
    }
}

/// Unicode's White_Space in UTF-8, which a token with rstrip swallows.
///
/// Not Python's `strip()`, which takes U+001C to U+001F besides, and not ICU's `\s`, which leaves
/// U+000B and U+0085.
enum WhiteSpace {
    /// Where the white space that begins at a place of a text ends.
    static func end(in text: UnsafeBufferPointer<UInt8>, from place: Int) -> Int {
        var at = place
        while at < text.count, let length = length(in: text, at: at) { at += length }
        return at
    }

    /// How many bytes the white-space scalar at a place has; nil for any other.
    private static func length(in text: UnsafeBufferPointer<UInt8>, at place: Int) -> Int? {
        func byte(_ offset: Int) -> UInt8 {
            place + offset < text.count ? text[place + offset] : 0
        }
        switch byte(0) {
        case 0x09...0x0D, 0x20:
            return 1
        case 0xC2:  // U+0085, U+00A0
            return byte(1) == 0x85 || byte(1) == 0xA0 ? 2 : nil
        case 0xE1:  // U+1680
            return byte(1) == 0x9A && byte(2) == 0x80 ? 3 : nil
        case 0xE2:  // U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F
            switch (byte(1), byte(2)) {
            case (0x80, 0x80...0x8A), (0x80, 0xA8...0xA9), (0x80, 0xAF), (0x81, 0x9F): return 3
            default: return nil
            }
        case 0xE3:  // U+3000
            return byte(1) == 0x80 && byte(2) == 0x80 ? 3 : nil
        default:
            return nil
        }
    }
}
