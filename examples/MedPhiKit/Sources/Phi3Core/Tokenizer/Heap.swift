/// A binary heap: the smallest comes out first.
struct Heap<Element: Comparable> {
    private var items: [Element] = []

    mutating func push(_ item: Element) {
        items.append(item)
        var at = items.count - 1
        while at > 0 {
            let parent = (at - 1) / 2
            guard items[at] < items[parent] else { return }
            items.swapAt(at, parent)
            at = parent
        }
    }

    mutating func pop() -> Element? {
        guard let last = items.popLast() else { return nil }
        guard let first = items.first else { return last }
        items[0] = last
        var at = 0
        while true {
            var child = 2 * at + 1
            if child >= items.count { return first }
            if child + 1 < items.count, items[child + 1] < items[child] { child += 1 }
            guard items[child] < items[at] else { return first }
            items.swapAt(at, child)
            at = child
        }
    }
}
