package fleet

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet/message"
)

// HistoryColumns are the headings of HistoryRow's cells.
var HistoryColumns = []string{"GEN", "SINCE", "RELEASE", "COMMIT", "AUTHOR", "SUBJECT"}

// HistoryRow returns one generation's cells, under HistoryColumns.
func HistoryRow(h deployments.History) []Text {
	at := "-"
	if !h.At.IsZero() {
		at = h.At.UTC().Format("2006-01-02 15:04Z")
	}
	commit := message.Clean(safetext.Prefix(h.Commit, 8))
	author, subject := AuthorName(h.Author), message.OneLine(h.Subject)
	if pin, ok := PinOf(h); ok {
		commit, author, subject = "-", message.OneLine(pin.By), "pinned"
	}
	return []Text{
		{strconv.FormatInt(h.Generation, 10), Plain},
		{at, Plain},
		{new(Unit).Release(h.Release), Bold},
		{commit, Plain},
		{author, Plain},
		{subject, Dim},
	}
}

// PinOf returns the pin of the whole unit whose release is rolled out in the generation of h. ok is false if the
// generation rolls out Git's release, or if h.Pins lacks the pin.
func PinOf(h deployments.History) (pin deployments.PastPin, ok bool) {
	if h.Pinned == nil {
		return pin, false
	}
	for _, p := range h.Pins {
		if p.Node == "" && p.Release == h.Release {
			pin, ok = p, true
		}
	}
	return pin, ok
}

// HistoryNotes returns the lines to show below a generation: its note unless a pin says more, then its pins and orders,
// oldest first. If the history left some of them out, a last line says so.
func HistoryNotes(h deployments.History) []Text {
	type event struct {
		at   time.Time
		says Text
	}
	var events []event
	for _, p := range h.Pins {
		events = append(events, event{p.At, pinLine(p)})
	}
	for _, o := range h.Orders {
		events = append(events, event{o.At, orderLine(o)})
	}
	slices.SortStableFunc(events, func(a, b event) int { return a.at.Compare(b.at) })
	var notes []Text
	if _, pinned := PinOf(h); h.Note != "" && !pinned { // the pin's own line says more
		notes = append(notes, Text{message.OneLine(h.Note), Warn})
	}
	for _, e := range events {
		notes = append(notes, e.says)
	}
	if h.Truncated {
		notes = append(notes, Text{"there were more pins or orders than the history keeps", Warn})
	}
	return notes
}

// pinLine formats a past pin: what it named, from when to when, by whom and why.
func pinLine(p deployments.PastPin) Text {
	nodes := "all nodes"
	if p.Node != "" {
		nodes = message.Clean(p.Node)
	}
	when, tone := pastTime(p.At)+" to "+pastTime(p.Ended), Plain
	switch {
	case p.Ended.IsZero():
		when, tone = "since "+pastTime(p.At), Warn
	case p.At.UTC().Format(time.DateOnly) == p.Ended.UTC().Format(time.DateOnly):
		when = pastTime(p.At) + " to " + p.Ended.UTC().Format("15:04:05Z")
	}
	says := fmt.Sprintf("%s: pin of %s: ", when, nodes)
	if p.Error != "" {
		return Text{says + "it doesn't parse, and changes nothing: " + message.OneLine(p.Error), tone}
	}
	says += pinTarget(new(Unit), p.Pin) + pastReason(p.By, p.Reason)
	if !p.Until.IsZero() {
		says += ", until " + pastTime(p.Until)
	}
	if p.AtOnce {
		says += ", at once"
	}
	return Text{says, tone}
}

func orderLine(o deployments.PastOrder) Text {
	says := pastTime(o.At) + ": order " + message.OneLine(string(o.Verb)) + pastReason(o.By, o.Order.Reason)
	if o.Refused != "" {
		why := message.Text(o.Refused, deployments.Facts{"order": string(o.Verb)})
		says += "; it changed nothing, the reason then: " + why
	}
	return Text{says, Plain}
}

// pastReason says who did something and why, or that it is unknown.
func pastReason(by, reason string) string {
	switch {
	case by == "" && reason == "":
		return ", nobody said who or why"
	case by == "":
		return ", nobody said who (" + message.OneLine(reason) + ")"
	case reason == "":
		return ", by " + message.OneLine(by)
	}
	return ", by " + message.OneLine(by) + " (" + message.OneLine(reason) + ")"
}

func pastTime(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }
