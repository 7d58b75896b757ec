package deployments

import (
	"encoding/json"
	"time"
)

// History is the JSON at history/STAGE/ROLE/UNIT/GENERATION: what a unit was told to run, by whom and when. The
// mirror writes it in the transaction that begins the generation; the newest HistoryKept of each unit stay.
type History struct {
	Generation int64   `json:"generation"`
	Release    Pointer `json:"release"`
	Stable     Pointer `json:"stable,omitzero"`
	// Commit, Author and Subject are the Git commit's that was mirrored then; Committed is its time.
	Commit    string    `json:"commit"`
	Author    string    `json:"author"`
	Subject   string    `json:"subject,omitempty"`
	Committed time.Time `json:"committed"`
	// At is when the mirror wrote it.
	At time.Time `json:"at"`
	// Failed is the digest of the release that the generation rolled back, or of the one that it replaced while a
	// node had that in quarantine: nodes forget this, and a rollback must not go back to it.
	Failed Digest `json:"failed,omitzero"`
	// Claim and Retry are the record's: a release that failed on a node stays out there if the record is lost.
	Claim int64 `json:"claim,omitempty"`
	Retry int64 `json:"retry,omitempty"`
	// Pinned is the record's, while a pin has its place.
	Pinned *Pinned `json:"pinned,omitempty"`
	// Note says what else led to it: a change by hand that was put back, an order, a rollout that was stopped.
	Note string `json:"note,omitempty"`
	// Pins are the pins of the unit, and of its nodes, that stood in this generation, the oldest first: what still
	// stands when the next generation begins stands in its entry, too. The mirror rewrites the newest entry when a
	// pin comes or ends.
	Pins []PastPin `json:"pins,omitempty"`
	// Orders are the orders that the mirror took in this generation, the oldest first. One that began it is its first.
	Orders []PastOrder `json:"orders,omitempty"`
	// Truncated is set if there were more pins or orders than an entry keeps.
	Truncated bool `json:"truncated,omitempty"`
}

// PastPin is a pin as the history keeps it. Its words are cut at MaxPastWords.
type PastPin struct {
	// At is when the mirror saw it. Ended is when it had been removed or replaced, or its Until had come; zero: it
	// stands.
	At    time.Time `json:"at"`
	Ended time.Time `json:"ended,omitzero"`
	// Node is the one node that it was for; empty: all nodes of the unit.
	Node string `json:"node,omitempty"`
	Pin
	// Error is why its value could not be read: it changed nothing on any node.
	Error string `json:"error,omitempty"`
}

// Same reports whether two pins say the same of the same nodes.
func (p PastPin) Same(q PastPin) bool {
	return p.Node == q.Node && p.Hold == q.Hold && p.Release == q.Release && p.By == q.By && p.Reason == q.Reason &&
		p.Until.Equal(q.Until) && p.AtOnce == q.AtOnce && p.Error == q.Error
}

// PastOrder is an order as the history keeps it. Its words are cut at MaxPastWords.
type PastOrder struct {
	// At is when the mirror took it.
	At time.Time `json:"at"`
	Order
	// Refused is why it changed nothing.
	Refused Reason `json:"refused,omitempty"`
}

const (
	// HistoryKept is how many generations of a unit stay in history/.
	HistoryKept = 50
	// MaxPastPins bounds the pins of a history entry, MaxPastOrders its orders, and MaxPastWords, in bytes, what one of
	// them keeps of by, reason and error: whoever may write pins or orders must not make an entry grow.
	MaxPastPins   = 50
	MaxPastOrders = 50
	MaxPastWords  = 200
)

// ParseHistory reads an entry of history/. Fields that it does not know are passed over.
func ParseHistory(value []byte) (History, error) {
	var h History
	err := lenientJSON(value, &h)
	return h, err
}

// UnmarshalJSON takes the name that the version before gave to Failed, too.
func (h *History) UnmarshalJSON(data []byte) error {
	type plain History
	var both struct {
		plain
		Bad Digest `json:"bad"`
	}
	if err := json.Unmarshal(data, &both); err != nil {
		return err
	}
	*h = History(both.plain)
	if h.Failed.IsZero() {
		h.Failed = both.Bad
	}
	return nil
}

// MergePins tells of each pin once, in the entry of the generation in which it began, with its end as the newest
// entry that has it knows it. history is the newest first, and is changed.
func MergePins(history []History) {
	began := map[pastPinKey]*PastPin{}
	for i := len(history) - 1; i >= 0; i-- {
		var own []PastPin
		for _, p := range history[i].Pins {
			key := pastPinKey{p.Node, p.At.UnixNano()}
			if first := began[key]; first != nil {
				first.Ended = p.Ended
				continue
			}
			own = append(own, p)
			began[key] = &own[len(own)-1]
		}
		// The list may have moved while it grew.
		for j := range own {
			began[pastPinKey{own[j].Node, own[j].At.UnixNano()}] = &own[j]
		}
		history[i].Pins = own
	}
}

// pastPinKey tells one pin from another: a node has one at a time.
type pastPinKey struct {
	node string
	at   int64
}
