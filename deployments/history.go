package deployments

import (
	"encoding/json"
	"strings"
	"time"

	"kedge/deployments/safetext"
)

// History is the JSON at history/STAGE/ROLE/UNIT/GENERATION: what a unit was told to run, by whom and when. The
// mirror writes it in the transaction that begins the generation; the newest HistoryKept of each unit stay.
type History struct {
	Generation int64   `json:"generation"`
	Release    Pointer `json:"release"`
	Stable     Pointer `json:"stable,omitzero"`
	// Commit, Author and Subject describe the Git commit that was mirrored then; Committed is the commit's time. An entry
	// that the mirror made again from the record has only Commit.
	Commit    string    `json:"commit"`
	Author    string    `json:"author"`
	Subject   string    `json:"subject,omitempty"`
	Committed time.Time `json:"committed"`
	// At is when the mirror first wrote the entry.
	At time.Time `json:"at"`
	// Failed is the digest of the release that this generation rolled back, or that it replaced
	// while a node had it in quarantine; zero: none. kedge rollback doesn't pick that release, even
	// if no node has it in quarantine any more, unless a later generation tried it again.
	Failed Digest `json:"failed,omitzero"`
	// Claim is the record's RequestGeneration, and Retry the record's Retry. They keep a failed
	// release out of the nodes where it failed even if the record is lost.
	Claim int64 `json:"claim,omitempty"`
	Retry int64 `json:"retry,omitempty"`
	// Pinned is a copy of Record.Pinned: what Git asked for while Release was a unit pin's; nil: it
	// was Git's.
	Pinned *Pinned `json:"pinned,omitempty"`
	// Note says what else led to the generation, such as a pin, an order, or a change by hand that was put back.
	Note string `json:"note,omitempty"`
	// Pins are the pins of the unit, and of its nodes, that were in force in this generation, the oldest first. A
	// pin that outlasts the generation is listed in the next entry, too. The mirror rewrites the newest entry when
	// a pin comes or ends.
	Pins []PastPin `json:"pins,omitempty"`
	// Orders are the newest orders that the mirror took in this generation, the oldest first. If an order began the
	// generation, it was the first.
	Orders []PastOrder `json:"orders,omitempty"`
	// Truncated is set if there were more pins or orders than an entry keeps.
	Truncated bool `json:"truncated,omitempty"`
}

// PastPin is a pin as the history keeps it. By, Reason and Error are cut at MaxPastWords.
type PastPin struct {
	// At is when the mirror saw the pin. Ended is when the mirror saw it removed or replaced, or Pin.Until if that had
	// come. Zero: the pin is in force, or outlasted the generation.
	At    time.Time `json:"at"`
	Ended time.Time `json:"ended,omitzero"`
	// Node is the one node that the pin was for; empty: all nodes of the unit.
	Node string `json:"node,omitempty"`
	Pin
	// Error says why the pin's value could not be read. Such a pin keeps its nodes as they are.
	Error string `json:"error,omitempty"`
}

// Same reports whether two pins are equal but for the times At and Ended.
func (p PastPin) Same(q PastPin) bool {
	return p.Node == q.Node && p.Hold == q.Hold && p.Release == q.Release && p.By == q.By && p.Reason == q.Reason &&
		p.Until.Equal(q.Until) && p.AtOnce == q.AtOnce && p.Error == q.Error
}

// PastOrder is an order as the history keeps it. By and Reason are cut at MaxPastWords.
type PastOrder struct {
	// At is when the mirror took the order.
	At time.Time `json:"at"`
	Order
	// Refused is why the order changed nothing; empty: it was obeyed.
	Refused Reason `json:"refused,omitempty"`
}

const (
	// HistoryKept is how many generations of a unit stay in history/.
	HistoryKept = 50
	// MaxPastPins bounds the pins of a history entry, and MaxPastOrders its orders. MaxPastWords bounds how many bytes of
	// each By, Reason and Error are kept. Whoever may write pins or orders must not make an entry grow without bound.
	MaxPastPins   = 50
	MaxPastOrders = 50
	MaxPastWords  = 200
)

// PastWords returns a stranger's text as the history keeps it: trimmed, printable, and cut after MaxPastWords bytes.
func PastWords(s string) string {
	return safetext.Clip(safetext.Printable(strings.TrimSpace(s)), MaxPastWords)
}

// ParseHistory parses an entry of history/. Unknown fields are ignored.
func ParseHistory(value []byte) (History, error) {
	var h History
	err := lenientJSON(value, &h)
	return h, err
}

// UnmarshalJSON also reads Failed under the JSON name that the previous version used.
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

// MergePins keeps each pin only in the oldest entry that lists it, and removes its other mentions from history. The
// pin's end is that of its newest mention. history is sorted newest first, and is changed in place.
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
		// own may have moved when it was appended to.
		for j := range own {
			began[pastPinKey{own[j].Node, own[j].At.UnixNano()}] = &own[j]
		}
		history[i].Pins = own
	}
}

// pastPinKey identifies a pin by its node (empty: all nodes) and its At: a node has one pin at a time.
type pastPinKey struct {
	node string
	at   int64
}
