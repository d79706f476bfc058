{{- define "vlmflow.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "vlmflow.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "vlmflow.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "vlmflow.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "vlmflow.selector" -}}
app.kubernetes.io/name: {{ include "vlmflow.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "vlmflow.labels" -}}
{{ include "vlmflow.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: vlmflow
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* name, namespace, labels and annotations of an object; (root, component, suffix, annotations) */}}
{{- define "vlmflow.metadata" -}}
name: {{ include "vlmflow.fullname" .root }}{{ with .suffix }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "vlmflow.labels" . | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (root, image, what): registry/repository@digest, or :tag; production demands a digest */}}
{{- define "vlmflow.image" -}}
{{- $image := .image -}}
{{- if not $image.repository -}}
{{- fail (printf "%s.repository is empty: name the image" .what) -}}
{{- end -}}
{{- $name := $image.repository -}}
{{- if and .root.Values.images.registry (ne .registry false) -}}
{{- $name = printf "%s/%s" .root.Values.images.registry $image.repository -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else if eq .root.Values.profile "production" -}}
{{- fail (printf "profile production: %s.digest is empty; a tag can change under a running platform. Set it to sha256:..." .what) -}}
{{- else if not $image.tag -}}
{{- fail (printf "%s has neither tag nor digest" .what) -}}
{{- else -}}
{{- printf "%s:%s" $name $image.tag -}}
{{- end -}}
{{- end -}}

{{- define "vlmflow.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "vlmflow.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "vlmflow.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* where the object store is, for people and pods */}}
{{- define "vlmflow.storeEndpoint" -}}
{{- if eq .Values.objectStore.mode "external" -}}
{{- .Values.objectStore.endpoint -}}
{{- else -}}
{{- printf "http://%s-store.%s:9000" (include "vlmflow.fullname" .) .Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "vlmflow.mlflowUri" -}}
{{- if .Values.mlflow.enabled -}}
{{- printf "http://%s-mlflow.%s:5000" (include "vlmflow.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- .Values.mlflow.trackingUri -}}
{{- end -}}
{{- end -}}

{{/* (root, value, what): an existing secret that the profile may demand */}}
{{- define "vlmflow.secret" -}}
{{- if and (not .value) (eq .root.Values.profile "production") -}}
{{- fail (printf "profile production: %s is empty; create the secret and name it" .what) -}}
{{- end -}}
{{- .value -}}
{{- end -}}

{{/* environment of a container that speaks to the store */}}
{{- define "vlmflow.storeEnv" -}}
- {name: VLMFLOW_S3_ENDPOINT, value: {{ include "vlmflow.storeEndpoint" . | quote }}}
- {name: AWS_REGION, value: {{ .Values.objectStore.region | quote }}}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ .Values.objectStore.existingSecret }}, key: accesskey}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.objectStore.existingSecret }}, key: secretkey}}
{{- if .Values.objectStore.caSecret }}
- {name: SSL_CERT_FILE, value: /etc/vlmflow/ca/ca.crt}
{{- end }}
{{- end -}}

{{/* (root, secret): MLflow with an identity of its own */}}
{{- define "vlmflow.mlflowEnv" -}}
- {name: MLFLOW_TRACKING_URI, value: {{ include "vlmflow.mlflowUri" .root | quote }}}
{{- with .secret }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom: {secretKeyRef: {name: {{ . }}, key: username}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: password}}
{{- end }}
{{- end -}}

{{- define "vlmflow.caMount" -}}
{{- if .Values.objectStore.caSecret }}
- {name: ca, mountPath: /etc/vlmflow/ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "vlmflow.caVolume" -}}
{{- if .Values.objectStore.caSecret }}
- {name: ca, secret: {secretName: {{ .Values.objectStore.caSecret }}}}
{{- end }}
{{- end -}}

{{/* settings of the TrainJob launcher (vlmflow/training/trainjob/config.py) as JSON */}}
{{- define "vlmflow.trainjob" -}}
{{- $names := dict "gpus" "gpus" "shared" "shared" "gpuResource" "gpu_resource" "cpusPerProcess" "cpus" "memoryGiBPerProcess" "memory_gib" "sharedMemoryGiB" "shm_gib" "scratchGiB" "scratch_gib" "nodeSelector" "node_selector" "tolerations" "tolerations" "queue" "queue" "priority" "priority" -}}
{{- $pools := dict -}}
{{- range $name, $pool := .Values.training.pools -}}
{{- $made := dict -}}
{{- range $key, $value := $pool -}}
{{- $_ := set $made (get $names $key) $value -}}
{{- end -}}
{{- $_ := set $pools $name $made -}}
{{- end -}}
{{- $secrets := list -}}
{{- range .Values.imagePullSecrets -}}
{{- $secrets = append $secrets .name -}}
{{- end -}}
{{- dict
  "runtime" (printf "%s-train" (include "vlmflow.fullname" .))
  "service_account" (printf "%s-training" (include "vlmflow.fullname" .))
  "image_pull_secrets" $secrets
  "deadline_seconds" (int .Values.training.activeDeadlineSeconds)
  "grace_seconds" (int .Values.training.gracePeriodSeconds)
  "patience_seconds" (int .Values.training.patienceSeconds)
  "secrets" (include "vlmflow.secrets" . | fromJson)
  "env" .Values.training.env
  "pools" $pools | toJson -}}
{{- end -}}

{{- define "vlmflow.mlflowServerEnv" -}}
{{- $admin := required "mlflow.adminSecret is empty: the server refuses to start without an administrator's password (keys admin-username, admin-password, flask-secret-key, webhook-encryption-key)" .Values.mlflow.adminSecret -}}
{{- include "vlmflow.storeEnv" . }}
- {name: MLFLOW_S3_ENDPOINT_URL, value: {{ include "vlmflow.storeEndpoint" . | quote }}}
- {name: MLFLOW_ARTIFACTS_DESTINATION, value: {{ .Values.mlflow.artifactRoot | quote }}}
{{- if eq .Values.mlflow.backend.kind "sqlite" }}
- {name: MLFLOW_BACKEND_STORE_URI, value: "sqlite:////var/lib/mlflow/mlflow.db"}
- {name: MLFLOW_AUTH_DATABASE_URI, value: "sqlite:////var/lib/mlflow/auth.db"}
{{- else }}
- name: MLFLOW_BACKEND_STORE_URI
  valueFrom: {secretKeyRef: {name: {{ .Values.mlflow.backend.existingSecret }}, key: uri}}
- name: MLFLOW_AUTH_DATABASE_URI
  valueFrom: {secretKeyRef: {name: {{ .Values.mlflow.backend.existingSecret }}, key: auth-uri}}
{{- end }}
- name: MLFLOW_AUTH_ADMIN_USERNAME
  valueFrom: {secretKeyRef: {name: {{ $admin }}, key: admin-username}}
- name: MLFLOW_AUTH_ADMIN_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $admin }}, key: admin-password}}
- name: MLFLOW_FLASK_SERVER_SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ $admin }}, key: flask-secret-key}}
- name: MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY
  valueFrom: {secretKeyRef: {name: {{ $admin }}, key: webhook-encryption-key}}
# The promoter is inside the cluster: plain HTTP and a private address, which MLflow refuses by default. Only
# administrators can make webhooks, and the network policy names the one receiver.
- {name: MLFLOW_WEBHOOK_ALLOWED_SCHEMES, value: "http,https"}
- {name: MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS, value: "true"}
{{- end -}}

{{/* "true" where there is a promoter: without a model it would have nothing to do, and its command refuses to start */}}
{{- define "vlmflow.promoting" -}}
{{- if and .Values.promoter.enabled .Values.promoter.models }}true{{ end -}}
{{- end -}}

{{/* policy of every model that the promoter looks after, for the pipeline `promote`: the same gates */}}
{{- define "vlmflow.policies" -}}
{{- $found := dict -}}
{{- range .Values.promoter.models -}}
{{- $_ := set $found . (merge (dict) (get $.Values.promoter.policies . | default dict) (dict "approval_tag" $.Values.promoter.approvalTag)) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* names of the secrets in the library -> names of this installation, as JSON */}}
{{- define "vlmflow.secrets" -}}
{{- $secrets := dict -}}
{{- range $ours, $theirs := dict "mlpipeline-minio-artifact" .Values.objectStore.existingSecret "vlmflow-endpoints" .Values.platform.endpointSecret "vlmflow-mlflow" .Values.mlflow.existingSecret "vlmflow-promoter" .Values.promoter.credentialsSecret -}}
{{- if $theirs }}{{ $_ := set $secrets $ours $theirs }}{{ end -}}
{{- end -}}
{{- toJson $secrets -}}
{{- end -}}

{{/* platform configuration that is compiled into the pipelines (vlmflow/installation.py) */}}
{{- define "vlmflow.installation" -}}
{{- $pull := list -}}
{{- range .Values.imagePullSecrets }}{{ $pull = append $pull .name }}{{ end -}}
{{- $pipelines := .Values.pipelines -}}
{{- dict "pull_secrets" $pull "secrets" (include "vlmflow.secrets" . | fromJson) "pools" $pipelines.pools "steps" $pipelines.steps "default_pool" $pipelines.defaultPool | toJson -}}
{{- end -}}
