/// Byte-pair encoding of plain text, as `tokenizers` does it for Phi-3.
///
/// A text without a pre-tokenizer is a single word, and a consultation is 15,000 characters long;
/// so the merges that are possible wait in a heap, and encoding is O(n log n).
struct BytePairEncoder: Sendable {
    /// What a pair of neighbouring ids becomes, and which pair goes first.
    private struct Merge {
        let rank: Int32
        let id: Int32
    }

    /// A merge that was possible when it was found.
    private struct Candidate: Comparable {
        /// The rank above the place, so that one comparison orders by both.
        let order: UInt64
        let id: Int32

        init(_ merge: Merge, at place: Int) {
            order = UInt64(merge.rank) << 36 | UInt64(place)
            id = merge.id
        }

        var place: Int { Int(order & (1 << 36 - 1)) }

        static func < (left: Candidate, right: Candidate) -> Bool { left.order < right.order }
    }

    /// The symbols of a word: a linked list in arrays, -1 where it ends and for what is merged
    /// away.
    private struct Word {
        var ids: [Int32]
        var previous: [Int32]
        var next: [Int32]
    }

    private let merges: [UInt64: Merge]
    private let scalars: [UInt32: Int32]
    private let bytes: [Int32]
    private let ascii: [Int32]
    private let spaceMark: [Int32]

    /// Why a list of merges cannot be used.
    struct Problem: Error {
        let what: String
    }

    /// - Parameters:
    ///   - vocabulary: all entries.
    ///   - excluded: ids that plain text never becomes.
    ///   - merges: pairs of entries, the first to be merged first.
    /// - Throws: `Problem` for a pair that is not of the vocabulary, or a byte without an entry.
    init(
        _ vocabulary: Vocabulary, excluding excluded: Set<Int32>, merges pairs: [([UInt8], [UInt8])]
    ) throws {
        func id(_ entry: [UInt8]) -> Int32? {
            vocabulary[entry].flatMap { excluded.contains($0) ? nil : $0 }
        }
        bytes = try (0...255).map { byte in
            let entry = Vocabulary.byteEntry(UInt8(byte))
            guard let id = id(entry) else {
                throw Problem(what: "no entry \(String(decoding: entry, as: UTF8.self))")
            }
            return id
        }
        var scalars: [UInt32: Int32] = [:]
        for (number, entry) in vocabulary.entries.enumerated() {
            let id = Int32(number)
            if let first = entry.first, scalarLength(first) == entry.count, !excluded.contains(id) {
                scalars[packed(entry[...])] = id
            }
        }
        var merges: [UInt64: Merge] = [:]
        merges.reserveCapacity(pairs.count)
        for (rank, pair) in pairs.enumerated() {
            guard let left = id(pair.0), let right = id(pair.1), let new = id(pair.0 + pair.1)
            else { throw Problem(what: "merge \(rank) names no entries of the vocabulary") }
            merges[pairKey(left, right)] = Merge(rank: Int32(rank), id: new)
        }
        self.merges = merges
        self.scalars = scalars
        let bytes = bytes
        ascii = (0..<128).map { scalars[UInt32($0)] ?? bytes[$0] }
        spaceMark =
            scalars[packed(Vocabulary.spaceMark[...])].map { [$0] }
            ?? Vocabulary.spaceMark.map { bytes[Int($0)] }
    }

    /// Appends the ids of a piece of text; of none when it is empty.
    ///
    /// - Parameter text: valid UTF-8. A space is put before it, as before every piece.
    func encode(_ text: UnsafeBufferPointer<UInt8>, into ids: inout [Int32]) {
        if text.isEmpty { return }
        var word = symbols(of: text)
        merge(&word)
        var place = 0
        while place >= 0 {
            ids.append(word.ids[place])
            place = Int(word.next[place])
        }
    }

    private func symbols(of text: UnsafeBufferPointer<UInt8>) -> Word {
        var ids: [Int32] = []
        ids.reserveCapacity(text.count + 3)
        ids += spaceMark
        var at = 0
        while at < text.count {
            let first = text[at]
            if first == 0x20 {
                ids += spaceMark
                at += 1
            } else if first < 0x80 {
                ids.append(ascii[Int(first)])
                at += 1
            } else {
                let end = min(at + scalarLength(first), text.count)
                if let id = scalars[packed(text[at..<end])] {
                    ids.append(id)
                } else {
                    for byte in text[at..<end] { ids.append(bytes[Int(byte)]) }
                }
                at = end
            }
        }
        let count = Int32(ids.count)
        return Word(
            ids: ids, previous: (0..<count).map { $0 - 1 },
            next: (0..<count).map { $0 + 1 < count ? $0 + 1 : -1 })
    }

    private func merge(_ word: inout Word) {
        var heap = Heap<Candidate>()
        for place in 0..<(word.ids.count - 1) {
            if let merge = merges[pairKey(word.ids[place], word.ids[place + 1])] {
                heap.push(Candidate(merge, at: place))
            }
        }
        while let candidate = heap.pop() {
            let place = candidate.place
            guard word.ids[place] >= 0, word.next[place] >= 0 else { continue }
            let right = Int(word.next[place])
            // An older candidate is known by its id alone, not by its rank: as in the reference.
            guard let merge = merges[pairKey(word.ids[place], word.ids[right])],
                merge.id == candidate.id
            else { continue }
            word.ids[place] = merge.id
            word.ids[right] = -1
            let after = Int(word.next[right])
            word.next[place] = Int32(after)
            if after >= 0 { word.previous[after] = Int32(place) }
            let before = Int(word.previous[place])
            if before >= 0, let merge = merges[pairKey(word.ids[before], word.ids[place])] {
                heap.push(Candidate(merge, at: before))
            }
            if after >= 0, let merge = merges[pairKey(word.ids[place], word.ids[after])] {
                heap.push(Candidate(merge, at: place))
            }
        }
    }
}

/// How many bytes of UTF-8 a scalar has, by the first of them.
private func scalarLength(_ first: UInt8) -> Int {
    first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4
}

/// At most four bytes of UTF-8 as one number.
private func packed(_ bytes: some Sequence<UInt8>) -> UInt32 {
    bytes.reduce(0) { $0 << 8 | UInt32($1) }
}

private func pairKey(_ left: Int32, _ right: Int32) -> UInt64 {
    UInt64(UInt32(bitPattern: left)) << 32 | UInt64(UInt32(bitPattern: right))
}
