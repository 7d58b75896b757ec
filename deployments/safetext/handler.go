package safetext

import (
	"context"
	"fmt"
	"log/slog"
)

// Handler is a slog.Handler that passes on records after changing their texts.
type Handler struct {
	next   slog.Handler
	change func(string) string
}

// NewHandler returns a Handler that applies Clean to a record's message and values, and passes the record on to next.
func NewHandler(next slog.Handler) Handler { return Handler{next, Clean} }

// NewChanger returns a Handler that applies change to a record's message and to the values of its attributes, not to
// their names. It passes the record on to next.
func NewChanger(next slog.Handler, change func(string) string) Handler { return Handler{next, change} }

// Enabled reports whether next handles records at the level.
func (h Handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

// Handle changes a record's texts and passes it on.
func (h Handler) Handle(ctx context.Context, r slog.Record) error {
	clean := slog.NewRecord(r.Time, r.Level, h.change(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		clean.AddAttrs(h.attr(a))
		return true
	})
	return h.next.Handle(ctx, clean)
}

// WithAttrs changes the attributes once, for all records.
func (h Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return Handler{h.next.WithAttrs(h.each(attrs)), h.change}
}

// WithGroup passes the group on to next.
func (h Handler) WithGroup(name string) slog.Handler {
	return Handler{h.next.WithGroup(name), h.change}
}

func (h Handler) each(attrs []slog.Attr) []slog.Attr {
	clean := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		clean[i] = h.attr(a)
	}
	return clean
}

func (h Handler) attr(a slog.Attr) slog.Attr {
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindString:
		v = slog.StringValue(h.change(v.String()))
	case slog.KindGroup:
		v = slog.GroupValue(h.each(v.Group())...)
	case slog.KindAny:
		switch value := v.Any().(type) {
		case error:
			v = slog.StringValue(h.change(value.Error()))
		case fmt.Stringer:
			v = slog.StringValue(h.change(value.String()))
		default:
			text := fmt.Sprint(value)
			if clean := h.change(text); clean != text {
				v = slog.StringValue(clean)
			}
		}
	}
	return slog.Attr{Key: a.Key, Value: v}
}
