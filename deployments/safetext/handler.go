package safetext

import (
	"context"
	"fmt"
	"log/slog"
)

// Handler is a slog.Handler that passes on records after cleaning their texts.
type Handler struct{ next slog.Handler }

// NewHandler returns a Handler that passes records on to next.
func NewHandler(next slog.Handler) Handler { return Handler{next} }

// Enabled returns what next's Enabled does.
func (h Handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

// Handle cleans a record and passes it on.
func (h Handler) Handle(ctx context.Context, r slog.Record) error {
	clean := slog.NewRecord(r.Time, r.Level, Clean(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		clean.AddAttrs(attr(a))
		return true
	})
	return h.next.Handle(ctx, clean)
}

// WithAttrs cleans the attributes once, for all records.
func (h Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return Handler{h.next.WithAttrs(each(attrs))}
}

// WithGroup passes the group on to next.
func (h Handler) WithGroup(name string) slog.Handler { return Handler{h.next.WithGroup(name)} }

func each(attrs []slog.Attr) []slog.Attr {
	clean := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		clean[i] = attr(a)
	}
	return clean
}

func attr(a slog.Attr) slog.Attr {
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindString:
		v = slog.StringValue(Clean(v.String()))
	case slog.KindGroup:
		v = slog.GroupValue(each(v.Group())...)
	case slog.KindAny:
		switch value := v.Any().(type) {
		case error:
			v = slog.StringValue(Clean(value.Error()))
		case fmt.Stringer:
			v = slog.StringValue(Clean(value.String()))
		default:
			text := fmt.Sprint(value)
			if clean := Clean(text); clean != text {
				v = slog.StringValue(clean)
			}
		}
	}
	return slog.Attr{Key: a.Key, Value: v}
}
