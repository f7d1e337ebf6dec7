{{/* Name of the chart's own objects: the release's, which says tandem once. At most 40 characters: suffixes follow. */}}
{{- define "tandem.name" -}}
{{- if contains "tandem" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-tandem" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.operator.name" -}}
{{ include "tandem.name" . }}-operator
{{- end -}}

{{/* Name of the operator's service account: its own, or one that is there. */}}
{{- define "tandem.serviceAccount" -}}
{{- .Values.operator.serviceAccount.name | default (include "tandem.operator.name" .) -}}
{{- end -}}

{{/* Labels of everything in the chart. */}}
{{- define "tandem.labels" -}}
app.kubernetes.io/name: tandem
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Labels that find the operator's pods; a Deployment's selector never changes. */}}
{{- define "tandem.operator.selector" -}}
app.kubernetes.io/name: tandem
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels that find the pods of the chart's fleet, by component: dict "component" "redis" "fleet" "r1". */}}
{{- define "tandem.fleet.selector" -}}
tandem.dev/fleet: {{ .fleet }}
{{- with .component }}
tandem.dev/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Who belongs to a fleet, as peers: its pods, and nodes on which they have the host's network: dict "fleet" "nodes". */}}
{{- define "tandem.fleet.peers" -}}
- podSelector:
    matchLabels:
      {{- include "tandem.fleet.selector" (dict "fleet" .fleet) | nindent 6 }}
{{- range .nodes }}
- ipBlock:
    cidr: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Labels that find the pod of `helm test`. */}}
{{- define "tandem.test.selector" -}}
app.kubernetes.io/name: tandem
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{/* Whether an object of an API that may not be there is made: dict "wish" "auto" "api" "group/version" "root" $. */}}
{{- define "tandem.wanted" -}}
{{- if or (eq .wish "always") (and (eq .wish "auto") (.root.Capabilities.APIVersions.Has .api)) -}}yes{{- end -}}
{{- end -}}

{{/* Namespaces that the operator looks at, comma separated; "*" = all. None given = the release's own. */}}
{{- define "tandem.namespaces" -}}
{{- .Values.operator.watchNamespaces | default (list .Release.Namespace) | join "," -}}
{{- end -}}

{{/* What the operator may do where fleets are. */}}
{{- define "tandem.operator.rules" -}}
# Fleets are people's: it reads them, and says what it found.
- apiGroups: [tandem.dev]
  resources: [fleets]
  verbs: [list, watch]
# What they own goes with them: pools are never deleted by the operator, groups are when they have drained.
- apiGroups: [tandem.dev]
  resources: [expertparallelpools]
  verbs: [list, watch, create, patch]
- apiGroups: [tandem.dev]
  resources: [expertparallelpools/scale]
  verbs: [patch]
- apiGroups: [tandem.dev]
  resources: [expertparallelgroups]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [tandem.dev]
  resources: [fleets/status, expertparallelpools/status, expertparallelgroups/status]
  verbs: [patch]
# Children. It reads no Secrets (pods get theirs from the kubelet), and changes no pods: it sees what they wait for.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [list, watch, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, watch, create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
# Its claim on a namespace with Fleets: no other release's operator acts there meanwhile.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [tandem-fleets]
  verbs: [get, update]
{{- if .Values.operator.rayClusters }}
# Its finalizer on Fleets in another's Ray cluster.
- apiGroups: [tandem.dev]
  resources: [fleets]
  verbs: [patch]
{{- end }}
{{- $groups := dict "volcano" "scheduling.volcano.sh" "coscheduling" "scheduling.x-k8s.io" }}
{{- range .Values.operator.gangSchedulers }}
- apiGroups: [{{ get $groups . }}]
  resources: [podgroups]
  verbs: [get, create, patch]
{{- end }}
{{- end -}}
